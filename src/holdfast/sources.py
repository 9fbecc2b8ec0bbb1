"""Where images come from: built-in digits, class folders, Parquet, Hugging Face `datasets`, torchvision.

A `Source` knows labels at once and decodes an image only when asked, so a small subset of a large set is cheap.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from holdfast.errors import UserError, one_line, require, unknown

Labels = npt.NDArray[np.int64]
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SPLIT_FOLDERS = {"train": ("train", "training"), "validation": ("validation", "valid", "val"), "test": ("test",)}


@dataclass(frozen=True)
class Split:
    """Labels (n,), and an opener for image i. `where(i)` names the image in errors."""

    labels: Labels
    open: Callable[[int], Image.Image]
    where: Callable[[int], str]


@dataclass(frozen=True)
class Source:
    """A labelled image set with its class names. `validation` and `test` may be missing: they are then split off."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split | None = None
    test: Split | None = None


def open_source(name: str) -> Source:
    """Open `digits`, a path, `parquet:PATH`, `folder:PATH`, `hf:NAME`, `torchvision:NAME`, or a plain name.

    A plain name is looked for as a folder below `HOLDFAST_DATA`, then in torchvision's table. Raises `UserError` for
    what cannot be found or read.
    """
    if name == "digits":
        return _digits()
    kind, _, rest = name.partition(":")
    if rest and kind in OPENERS:
        return OPENERS[kind](rest)
    path = Path(name).expanduser()
    if path.exists():
        return _open_path(path)
    data = data_folder()
    if data is not None and (data / name).is_dir() and "/" not in name:
        return _open_path(data / name)
    if name.lower() in TORCHVISION:
        return open_torchvision(name)
    if "/" in name or name.startswith("."):
        raise UserError(f"data not found: {name} (expected a folder of class folders, a Parquet file or folder)")
    hint = "" if data else "; set HOLDFAST_DATA to a folder of data sets to name them directly"
    raise UserError(f"{unknown('domain', name, [*known_names(), *TORCHVISION])}; or a path, hf:NAME{hint}")


def data_folder() -> Path | None:
    """The folder that `HOLDFAST_DATA` names, or None."""
    value = os.environ.get("HOLDFAST_DATA")
    if not value:
        return None
    path = Path(value).expanduser()
    require(path.is_dir(), f"HOLDFAST_DATA must name a folder, but '{value}' is none")
    return path


def known_names() -> list[str]:
    """Names that need no download: built-in, and image sets below `HOLDFAST_DATA`."""
    data = data_folder()
    local = sorted(p.name for p in data.iterdir() if _parquet_files(p)) if data else []
    return ["digits", *local]


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # 8×8 with values 0…16
    split = array_split(pixels, bunch.target, "digits")
    return Source("digits", tuple(str(n) for n in bunch.target_names), split)


def array_split(images: npt.NDArray[np.uint8], labels: Any, name: str) -> Split:
    """A split over uint8 images in memory, shape (n, h, w) or (n, h, w, 3)."""
    return Split(
        np.asarray(labels, dtype=np.int64), lambda i: Image.fromarray(images[i]), lambda i: f"image {i} of {name}"
    )


def _open_path(path: Path) -> Source:
    if path.is_file() or _parquet_files(path):
        return open_parquet(str(path))
    return open_folder(str(path))


def open_folder(name: str) -> Source:
    """Class folders: `ROOT/CLASS/*.png`, or `ROOT/{train,validation,test}/CLASS/*`."""
    root = Path(name).expanduser()
    require(root.is_dir(), f"folder not found: {root}")
    parts = {
        split: next((root / n for n in names if (root / n).is_dir()), None) for split, names in SPLIT_FOLDERS.items()
    }
    train_root = parts["train"] or root
    classes = tuple(sorted(p.name for p in train_root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    require(
        bool(classes),
        f"{train_root} holds no class folders (expected FOLDER/CLASS/image.png, or FOLDER/train/CLASS/…, or Parquet)",
    )

    def split(folder: Path) -> Split:
        extra = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name not in classes)
        require(not extra, f"{folder} holds classes that {train_root} lacks: {', '.join(extra[:5])}")
        files, labels = [], []
        for label, cls in enumerate(classes):
            here = folder / cls
            found = sorted(p for p in here.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if here.is_dir() else []
            files += found
            labels += [label] * len(found)
        require(bool(files), f"{folder} holds no images (expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))})")
        return Split(np.array(labels, dtype=np.int64), lambda i: Image.open(files[i]), lambda i: str(files[i]))

    validation, test = parts["validation"], parts["test"]
    return Source(
        root.name, classes, split(train_root), split(validation) if validation else None, split(test) if test else None
    )


def open_parquet(name: str) -> Source:
    """A Parquet file, or a folder of them, in the Hugging Face image layout (struct of `bytes`, `path`; `label`).

    Splits come from file names (`train*.parquet`, `test-00000-of-00001.parquet` …); a single file is all training data.
    """
    path = Path(name).expanduser()
    require(path.exists(), f"data not found: {path}")
    files = [path] if path.is_file() else _parquet_files(path)
    require(bool(files), f"{path} holds no Parquet files")
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_split_of(file) if len(files) > 1 else "train", []).append(file)
    require("train" in groups, f"{path} has no train*.parquet (found {', '.join(f.name for f in files[:5])})")
    tables = {split: _read_tables(group) for split, group in groups.items()}
    names = _class_names(path, tables["train"])
    splits = {split: _table_split(table, f"{path}/{split}", len(names or ())) for split, table in tables.items()}
    classes = names or tuple(str(i) for i in range(int(splits["train"].labels.max()) + 1))
    return Source(path.stem, classes, splits["train"], splits.get("validation"), splits.get("test"))


def _parquet_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))


def _split_of(file: Path) -> str:
    for split, names in SPLIT_FOLDERS.items():
        if file.name.lower().startswith(names):
            return split
    raise UserError(f"cannot tell the split of {file.name}; expected train*, validation* or test*.parquet")


def _read_tables(files: Sequence[Path]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read {file}: truncated, or not a Parquet file ({one_line(error, 120)})") from error
    return pa.concat_tables(tables)


def _features(table: Any) -> dict[str, Any]:
    meta = (table.schema.metadata or {}).get(b"huggingface")
    info = json.loads(meta) if meta else {}
    features = info.get("info", {}).get("features", {})
    return features if isinstance(features, dict) else {}


def _class_names(path: Path, table: Any) -> tuple[str, ...] | None:
    label = _features(table).get(_label_column(table, str(path)), {})
    if isinstance(label, dict) and label.get("names"):
        return tuple(label["names"])
    card = (path if path.is_dir() else path.parent) / "dataset.json"
    if card.is_file():
        names = json.loads(card.read_text()).get("classes")
        return tuple(names) if names else None
    return None


def _label_column(table: Any, where: str) -> str:
    columns = list(table.column_names)
    for name in ("label", "labels", "fine_label"):
        if name in columns:
            return name
    raise UserError(f"{where} has no column 'label' (found {', '.join(columns)}): expected images with labels")


def _table_split(table: Any, where: str, classes: int, follow_paths: bool = False) -> Split:
    """`follow_paths`: open the file that a row names instead of holding its bytes; only for tables that `datasets` made
    on this machine, never on the word of a Parquet file."""
    import pyarrow as pa

    label_column = _label_column(table, where)
    image_column = next(
        (
            f.name
            for f in table.schema
            if pa.types.is_binary(f.type)
            or (pa.types.is_struct(f.type) and any(f.type.field(k).name == "bytes" for k in range(f.type.num_fields)))
        ),
        None,
    )
    require(
        image_column is not None,
        f"{where} has no image column (a struct with 'bytes', or binary); found {', '.join(table.column_names)}",
    )
    require(table.num_rows > 0, f"{where} has no rows")
    labels = np.asarray(table[label_column].to_numpy(), dtype=np.int64)
    require(labels.min() >= 0, f"{where} has unlabelled rows (label −1)")
    require(not classes or labels.max() < classes, f"{where} has label {labels.max()}, but only {classes} class names")
    images = table[image_column]

    def open_row(i: int) -> Image.Image:
        value = images[i].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None and follow_paths and isinstance(value, dict) and value["path"]:
            return Image.open(value["path"])
        require(data is not None, f"row {i} of {where} holds a path but no image bytes")
        return Image.open(io.BytesIO(data))

    return Split(labels, open_row, lambda i: f"row {i} of {where}")


def open_hub(name: str) -> Source:
    """A data set of the Hugging Face Hub, or a local folder that `datasets` understands; `hf:NAME` or `hf:NAME/CONFIG`
    after `@`: `hf:cifar100@cifar100`."""
    import datasets

    dataset, _, config = name.partition("@")
    try:
        loaded = datasets.load_dataset(dataset, config or None)
    except Exception as error:  # the library raises dozens of kinds; to the user all mean "not loaded"
        raise UserError(f"cannot load the Hugging Face data set '{name}': {one_line(error, 160)}") from error
    splits: dict[str, Split] = {}
    classes: tuple[str, ...] | None = None
    for key, part in loaded.items():
        split = next((s for s, names in SPLIT_FOLDERS.items() if str(key).startswith(names)), None)
        if split is None:
            continue
        image = next((n for n, f in part.features.items() if isinstance(f, datasets.Image)), None)
        require(image is not None, f"'{name}' has no image column (found {', '.join(part.features)})")
        table = part.cast_column(image, datasets.Image(decode=False)).with_format("arrow")[:]
        label = _label_column(table, name)
        classes = classes or tuple(getattr(part.features[label], "names", None) or ())
        splits[split] = _table_split(table, f"{name}/{key}", len(classes), follow_paths=True)
    require("train" in splits, f"'{name}' has no training split (found {', '.join(map(str, loaded))})")
    classes = classes or tuple(str(i) for i in range(int(splits["train"].labels.max()) + 1))
    return Source(dataset, classes, splits["train"], splits.get("validation"), splits.get("test"))


# name -> (class in torchvision.datasets, keyword arguments for train, validation, test; None: no such split)
_FLAG = ({"train": True}, None, {"train": False})
_SPLIT = ({"split": "train"}, None, {"split": "test"})
_THREE = ({"split": "train"}, {"split": "val"}, {"split": "test"})
TORCHVISION: dict[str, tuple[str, tuple[dict[str, Any] | None, ...]]] = {
    "cifar10": ("CIFAR10", _FLAG),
    "cifar100": ("CIFAR100", _FLAG),
    "mnist": ("MNIST", _FLAG),
    "fashion_mnist": ("FashionMNIST", _FLAG),
    "kmnist": ("KMNIST", _FLAG),
    "qmnist": ("QMNIST", _FLAG),
    "usps": ("USPS", _FLAG),
    "svhn": ("SVHN", _SPLIT),
    "stl10": ("STL10", _SPLIT),
    "imagenette": ("Imagenette", ({"split": "train", "size": "160px"}, None, {"split": "val", "size": "160px"})),
    "food101": ("Food101", _SPLIT),
    "gtsrb": ("GTSRB", _SPLIT),
    "flowers102": ("Flowers102", _THREE),
    "dtd": ("DTD", _THREE),
    "fgvc_aircraft": ("FGVCAircraft", _THREE),
    "pcam": ("PCAM", _THREE),
    "oxford_pets": ("OxfordIIITPet", ({"split": "trainval"}, None, {"split": "test"})),
    "celeba": (
        "CelebA",
        ({"split": "train"}, {"split": "valid"}, {"split": "test"}),
    ),
}
CELEBA_ATTRIBUTE = "Smiling"


def open_torchvision(name: str) -> Source:
    """A torchvision data set by name, downloaded where there is a network, kept in `HOLDFAST_CACHE`
    (default `~/.cache/holdfast`). CelebA is a binary task on one attribute: `celeba/Male`; default Smiling."""
    import torchvision.datasets as tv

    key, _, attribute = name.lower().partition("/")
    if key not in TORCHVISION:
        raise unknown("torchvision data set", key, TORCHVISION)
    cls, variants = TORCHVISION[key]
    root = Path(os.environ.get("HOLDFAST_CACHE", "~/.cache/holdfast")).expanduser() / "torchvision"
    parts: list[Any] = []
    for kwargs in variants:
        if kwargs is None:
            parts.append(None)
            continue
        try:
            root.mkdir(parents=True, exist_ok=True)
            parts.append(getattr(tv, cls)(root=str(root), download=True, **kwargs))
        except Exception as error:  # no network, checksum, missing reader package: one line for all
            raise UserError(f"cannot get {cls} from torchvision: {one_line(error, 160)}") from error
    splits = [_torchvision_split(p, name, attribute) if p is not None else None for p in parts]
    train = splits[0]
    classes = ("no", "yes") if cls == "CelebA" else getattr(parts[0], "classes", None)
    names = tuple(_text(c) for c in classes) if classes else tuple(str(i) for i in range(10))
    if train is None:
        raise UserError(f"{cls} has no training split")
    return Source(key, names, train, splits[1], splits[2])


def _text(name: Any) -> str:
    return str(name[0]) if isinstance(name, tuple) else str(name)


def _torchvision_split(data: Any, name: str, attribute: str) -> Split:
    if hasattr(data, "attr_names"):
        wanted = (attribute or CELEBA_ATTRIBUTE).lower()
        names = [str(a).lower() for a in data.attr_names]
        if wanted not in names:
            raise unknown("CelebA attribute", attribute, [str(a) for a in data.attr_names if a])
        labels = data.attr[:, names.index(wanted)].numpy()
    else:
        found = next(
            (getattr(data, n) for n in ("targets", "labels", "_labels") if getattr(data, n, None) is not None), None
        )
        if found is None and hasattr(data, "_samples"):
            found = [s[1] for s in data._samples]
        labels = np.asarray(found if found is not None else [data[i][1] for i in range(len(data))])
    return Split(labels.astype(np.int64), lambda i: data[i][0], lambda i: f"image {i} of {name}")


OPENERS: dict[str, Callable[[str], Source]] = {
    "folder": open_folder,
    "parquet": open_parquet,
    "hf": open_hub,
    "torchvision": open_torchvision,
}
