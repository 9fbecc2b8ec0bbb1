"""Where images come from, each kind for real, and what bad data says."""

import gzip
import io
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from holdfast.domains import DomainSpec, load_domain, parse_selection, public_name, sample, select_classes
from holdfast.errors import UserError
from holdfast.preprocessing import Preprocessing
from holdfast.sources import known_names, open_source
from holdfast.torchvision_sets import TORCHVISION

COLOUR = Preprocessing(8, 3)
GREY = Preprocessing(8, 1)


def picture(seed: int, size: tuple[int, int] = (10, 12), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(
    root: Path, per_class: int = 8, classes: tuple[str, ...] = ("cat", "dog", "emu"), offset: int = 0
) -> Path:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            picture(offset + 100 * c + i).save(root / name / f"{i}.png")
    return root


def write_parquet(path: Path, labels: list[int], names: list[str] | None = None, offset: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": encoded(offset + i), "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({"image": rows, "label": pa.array(labels, pa.int64())})
    if names:
        feature = {"_type": "ClassLabel", "names": names}
        info = {"info": {"features": {"label": feature, "image": {"_type": "Image"}}}}
        import json

        table = table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
    pq.write_table(table, path)
    return path


def test_digits_are_built_in() -> None:
    source = open_source("digits")
    assert len(source.train.labels) == 1797
    assert source.classes == tuple("0123456789")
    first = np.asarray(source.train.open(0))
    assert first.shape == (8, 8)
    assert first.max() == 239  # 15 of 16
    assert "digits" in known_names()


def test_class_folders(tmp_path: Path) -> None:
    domain = load_domain(str(write_folder(tmp_path / "pets")), COLOUR)
    assert domain.classes == ("cat", "dog", "emu")
    assert domain.train.images.shape[1:] == (3, 8, 8)
    assert (len(domain.test), len(domain.validation)) == (6, 3)


def test_class_folders_with_splits(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", 2, offset=1000)
    write_folder(tmp_path / "test", 3, offset=2000)
    domain = load_domain(DomainSpec(f"folder:{tmp_path}[dog,cat]"), GREY)
    assert domain.classes == ("dog", "cat")
    assert domain.test.images.shape == (6, 1, 8, 8)


def test_parquet_in_the_hugging_face_layout(tmp_path: Path) -> None:
    labels = [i % 3 for i in range(30)]
    write_parquet(tmp_path / "set" / "train-00000-of-00002.parquet", labels, ["a", "b", "c"])
    write_parquet(tmp_path / "set" / "train-00001-of-00002.parquet", labels, ["a", "b", "c"], offset=50)
    write_parquet(tmp_path / "set" / "test-00000-of-00001.parquet", labels, ["a", "b", "c"], offset=90)
    domain = load_domain(str(tmp_path / "set"), COLOUR)
    assert domain.classes == ("a", "b", "c")
    assert len(domain.train) + len(domain.validation) == 60
    assert len(domain.test) == 30


def test_hugging_face_datasets_by_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "hub" / "train.parquet", [i % 2 for i in range(20)], ["no", "yes"])
    write_folder(tmp_path / "images" / "train")
    assert load_domain(f"hf:{tmp_path}/images", COLOUR).classes == ("cat", "dog", "emu")
    with pytest.raises(UserError, match="cannot load the Hugging Face data set"):
        open_source("hf:nobody/nothing-of-the-kind")


def test_torchvision_by_name(tmp_path: Path) -> None:
    raw = Path(os.environ["HOLDFAST_CACHE"]) / "torchvision" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for stem, count in (("train", 60), ("t10k", 20)):
        pixels, labels = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        for name, header, data in (
            ("images-idx3", struct.pack(">IIII", 2051, count, 28, 28), pixels),
            ("labels-idx1", struct.pack(">II", 2049, count), labels),
        ):
            content = header + data.tobytes()
            (raw / f"{stem}-{name}-ubyte").write_bytes(content)
            (raw / f"{stem}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    domain = load_domain("torchvision:mnist[0-3]", GREY)
    assert len(domain.classes) == 4
    assert len(domain.test) == 8
    for name, (cls, _) in TORCHVISION.items():
        import torchvision.datasets

        assert hasattr(torchvision.datasets, cls), name


def test_torchvision_without_a_network_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot get SVHN from torchvision"):
        open_source("torchvision:svhn")


def test_selection_of_classes() -> None:
    names = ("plane", "car", "bird", "cat")
    assert parse_selection("cifar10[0-4]") == ("cifar10", "0-4")
    assert parse_selection("a/b") == ("a/b", None)
    assert select_classes(names, "1-2, cat") == [1, 2, 3]
    assert select_classes(("3", "1"), "1,3") == [1, 0]  # names win over numbers
    for bad in ("9", "2-9", "dgo", "1,1"):
        with pytest.raises(UserError):
            select_classes(names, bad)


def test_at_most_n_a_class_and_labels_from_zero(restricted) -> None:
    domain = load_domain(DomainSpec("digits[5-9]", per_class=20, test_per_class=7), GREY)
    assert torch.bincount(domain.test.labels).tolist() == [7] * 5
    assert torch.bincount(domain.train.labels).tolist() == [17] * 5
    assert torch.bincount(domain.validation.labels).tolist() == [3] * 5


def test_light_becomes_dark() -> None:
    for data in ("digits[0-2]", "digits[0-1] + digits[2-3]"):
        plain, inverted = (
            load_domain(DomainSpec(data, per_class=20, test_per_class=5, invert=on), GREY) for on in (False, True)
        )
        for split in ("train", "validation", "test"):
            before, after = getattr(plain, split), getattr(inverted, split)
            assert torch.equal(before.images, 255 - after.images)
            assert torch.equal(before.labels, after.labels)


def test_the_splits_share_no_image(original) -> None:
    parts = [set(getattr(original, n).digests()) for n in ("train", "validation", "test")]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_several_domains_are_one(architecture) -> None:
    """Classes of the same name are the same class; limits hold for each domain; duplicates are kept once."""
    spec = DomainSpec("digits[0-2] + digits[2,4]", per_class=20, test_per_class=5)
    both = load_domain(spec, architecture.preprocessing)
    assert both.classes == ("0", "1", "2", "4")
    assert both.test.labels.bincount().tolist() == [5, 5, 10, 5]
    assert both.dropped > 0, "class 2 comes twice, with the same images"
    seen = [d for part in (both.train, both.validation) for d in part.digests()]
    assert len(seen) == len(set(seen))
    fours = load_domain(replace(spec, data="digits[2,4]"), architecture.preprocessing)
    ours = {d for d, y in zip(both.train.digests(), both.train.labels.tolist(), strict=True) if y == 3}
    theirs = {d for d, y in zip(fours.train.digests(), fours.train.labels.tolist(), strict=True) if y == 1}
    assert ours == theirs
    assert public_name("folder:/home/me/pets + digits[2]") == "pets + digits[2]"


def test_halves_are_disjoint_stratified_and_seeded(restricted) -> None:
    defender, adversary = restricted.halves(0)
    assert not set(defender.digests()) & set(adversary.digests())
    assert len(defender) + len(adversary) == len(restricted.train)
    ours, theirs = torch.bincount(defender.labels), torch.bincount(adversary.labels)
    assert (ours - theirs).abs().max() <= 1
    again, other = restricted.halves(0), restricted.halves(1)
    assert again[0].digests() == defender.digests()
    assert other[0].digests() != defender.digests()


def test_every_seed_of_the_adversary_draws_its_own_images_from_its_half(restricted) -> None:
    defender, half = restricted.halves(0)
    draws = [sample(half, 23, seed) for seed in (0, 1, 0)]
    assert torch.bincount(draws[0].labels).tolist() == [5, 5, 5, 4, 4]
    assert draws[0].digests() == draws[2].digests()
    assert draws[0].digests() != draws[1].digests()
    assert not set(draws[1].digests()) & set(defender.digests())
    assert sample(half, None, 0) is half
    with pytest.raises(UserError, match="adversary's images must number"):
        sample(half, 10**6, 0)


def test_an_image_that_occurs_twice_cannot_reach_both_halves(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets")
    for i in range(8):
        picture(0).save(root / "cat" / f"copy{i}.png")
    domain = load_domain(str(root), COLOUR)
    assert domain.dropped >= 4
    digests = domain.train.digests()
    assert len(set(digests)) == len(digests)


def test_images_are_made_to_fit() -> None:
    assert GREY.fit(picture(1, (20, 9))).shape == (1, 8, 8)
    assert COLOUR.fit(picture(1, (8, 8), "L")).shape == (3, 8, 8)
    deep = Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16))
    assert GREY.fit(deep).unique().tolist() == [255]
    x = Preprocessing(8, 3, (0.5, 0.4, 0.3), (0.1, 0.2, 0.4)).normalise(
        torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    )
    assert x[0, :, 0, 0].tolist() == pytest.approx([5.0, 3.0, 1.75])


def test_what_is_in_the_test_data_is_nowhere_else(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", 4, offset=6)  # two of each class are in the training data
    write_folder(tmp_path / "test", 3, offset=8)  # two of each class are in the validation data
    domain = load_domain(str(tmp_path), COLOUR)
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (18, 6, 9)
    assert domain.dropped == 12
    write_folder(tmp_path / "same" / "train")
    write_folder(tmp_path / "same" / "test")
    with pytest.raises(UserError, match="must differ"):
        load_domain(str(tmp_path / "same"), COLOUR)


class TestBadData:
    def test_missing(self) -> None:
        with pytest.raises(UserError, match=r"unknown domain 'digit' .did you mean 'digits'"):
            open_source("digit")
        with pytest.raises(UserError, match="data not found"):
            open_source("./nowhere/at/all")

    def test_truncated_parquet(self, tmp_path: Path) -> None:
        file = write_parquet(tmp_path / "train.parquet", [0, 1] * 10)
        file.write_bytes(file.read_bytes()[:-200])
        with pytest.raises(UserError, match=r"cannot read .*train\.parquet: truncated"):
            load_domain(str(file), COLOUR)

    def test_a_corrupt_image_among_good_ones(self, tmp_path: Path) -> None:
        root = write_folder(tmp_path / "pets")
        bad = root / "dog" / "3.png"
        bad.write_bytes(bad.read_bytes()[:80])
        with pytest.raises(UserError, match=r"cannot decode .*dog/3\.png"):
            load_domain(str(root), COLOUR)

    def test_a_corrupt_row_among_good_ones(self, tmp_path: Path) -> None:
        rows = [{"bytes": encoded(i) if i != 4 else b"no image", "path": ""} for i in range(20)]
        pq.write_table(pa.table({"image": rows, "label": [i % 2 for i in range(20)]}), tmp_path / "x.parquet")
        with pytest.raises(UserError, match="cannot decode row 4 of"):
            load_domain(str(tmp_path / "x.parquet"), COLOUR)

    def test_one_class(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="has one class"):
            load_domain("digits[3]", GREY)
        with pytest.raises(UserError, match="has one class"):
            load_domain(str(write_folder(tmp_path / "faces", classes=("face",))), COLOUR)

    def test_no_labels_and_no_images(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [{"bytes": b"", "path": ""}]}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match="no column 'label'"):
            open_source(str(tmp_path / "a.parquet"))
        pq.write_table(pa.table({"text": ["x"], "label": [0]}), tmp_path / "b.parquet")
        with pytest.raises(UserError, match="no image column"):
            open_source(str(tmp_path / "b.parquet"))

    def test_labels_that_are_words(self, tmp_path: Path) -> None:
        table = pa.table({"image": [{"bytes": b"", "path": ""}] * 2, "label": ["cat", "dog"]})
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(UserError, match="labels must be integers"):
            open_source(str(tmp_path / "a.parquet"))

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds no class folders"):
            open_source(str(tmp_path))

    def test_too_few_images_for_two_halves(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="at least 2"):
            load_domain(str(write_folder(tmp_path / "pets", per_class=2)), COLOUR).halves(0)


@pytest.mark.data
@pytest.mark.parametrize(("name", "size"), [("usps", 16), ("mnist_m", 32), ("tiny_imagenet20[0-4]", 64)])
def test_real_data_sets(name: str, size: int) -> None:
    if not os.environ.get("HOLDFAST_DATA"):
        pytest.skip("HOLDFAST_DATA is not set")
    domain = load_domain(DomainSpec(name, per_class=40, test_per_class=10), Preprocessing(size, 3))
    defender, adversary = domain.halves(0)
    assert not set(defender.digests()) & set(adversary.digests())
    assert len(domain.test) == 10 * len(domain.classes)


@pytest.mark.data
def test_real_faces_have_one_class() -> None:
    if not os.environ.get("HOLDFAST_DATA"):
        pytest.skip("HOLDFAST_DATA is not set")
    with pytest.raises(UserError, match="has one class"):
        load_domain("celeba_faces", Preprocessing(16, 3))
