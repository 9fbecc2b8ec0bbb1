"""A domain: a named task with training, validation and test images, decoded once and held as tensors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from holdfast.errors import UserError, one_line, require
from holdfast.imagesets import Labels, Source, Split
from holdfast.preprocessing import Preprocessing
from holdfast.runtime import Runtime
from holdfast.seeding import generator
from holdfast.sources import open_source


@dataclass(frozen=True)
class ImageData:
    """Images uint8 (n, c, h, w) and labels int64 (n,), with the normalisation that the model wants."""

    images: Tensor
    labels: Tensor
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageData:
        """The samples at `indices` (int64), in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def batch(self, indices: Tensor, runtime: Runtime) -> tuple[Tensor, Tensor]:
        """Normalised float32 images (b, c, h, w) and labels (b,) on the runtime's device."""
        where = indices.to(self.images.device)
        images = self.preprocessing.normalise(self.images[where].to(runtime.device))
        return runtime.images(images), self.labels[where].to(runtime.device)

    def to(self, runtime: Runtime) -> ImageData:
        """Move to the device once, so that no batch has to."""
        return replace(self, images=self.images.to(runtime.device), labels=self.labels.to(runtime.device))

    def digests(self) -> list[bytes]:
        """A hash of every image's pixels."""
        flat = self.images.reshape(len(self), -1).cpu().numpy()
        return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in flat]

    def sha256(self) -> str:
        """One hash over all pixels and labels, in order."""
        digest = hashlib.sha256(b"".join(self.digests()))
        digest.update(self.labels.cpu().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Domain:
    """Training, validation and test data over the same classes (labels 0 … C−1)."""

    name: str
    classes: tuple[str, ...]
    train: ImageData
    validation: ImageData
    test: ImageData
    dropped: int = 0  # training and validation images whose pixels occur a second time in the domain

    def halves(self, seed: int) -> tuple[ImageData, ImageData]:
        """The defender's and the adversary's halves of the training data (SOPHON, §5.1.4).

        Disjoint by construction: each class is shuffled and cut once.
        """
        order = [_shuffled(self.train.labels, c, generator(seed, "halves", c)) for c in range(len(self.classes))]
        first, second = [o[: (len(o) + 1) // 2] for o in order], [o[(len(o) + 1) // 2 :] for o in order]
        require(
            all(len(s) for s in first + second),
            f"{self.name}: every class needs at least 2 training images, one for each half"
            + (f" ({self.dropped} images that occur twice in the domain were left out)" if self.dropped else ""),
        )
        return self.train.subset(torch.cat(first)), self.train.subset(torch.cat(second))

    def to(self, runtime: Runtime) -> Domain:
        """All splits on the runtime's device."""
        moved = {n: getattr(self, n).to(runtime) for n in ("train", "validation", "test")}
        return replace(self, **moved)


@dataclass(frozen=True)
class DomainSpec:
    """How to make a domain: `data` is a source with an optional selection of classes, such as `cifar10[0-4]`,
    `pets/[cat,dog]`, `hf:cifar100`; see `holdfast.sources.open_source`.

    `per_class` / `test_per_class`: at most so many training (validation included) and test images a class.
    `validation_fraction`, `test_fraction`: what is split off the training data, stratified, where the source has no
    such split. `adversary`: how many images the adversary draws from its half, anew for every audit seed
    (restricted domain only; default: all of the half). `invert`: light becomes dark (255 − x).
    """

    data: str
    per_class: int | None = None
    test_per_class: int | None = None
    validation_fraction: float = 0.15
    test_fraction: float = 0.25
    adversary: int | None = None
    invert: bool = False
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("per_class", "test_per_class", "adversary"):
            value = getattr(self, name)
            require(value is None or value >= 2, f"{name} must be at least 2, but got {value}")
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            require(0 < value < 0.9, f"{name} must lie in (0, 0.9), but got {value}")


def load_domain(spec: DomainSpec | str, preprocessing: Preprocessing, seed: int = 0, least_classes: int = 2) -> Domain:
    """Decode a domain. Which images are taken depends on `seed` and the spec alone.

    Several domains at once, `usps + mnist_m`, are one: classes of the same name are the same class, all limits hold for
    each of them. Raises `UserError` for data that is missing, truncated, corrupt or unlabelled, or that has fewer than
    `least_classes` classes: one is enough for generation.
    """
    spec = DomainSpec(spec) if isinstance(spec, str) else spec
    parts = parts_of(spec.data)
    if len(parts) > 1:
        return _joined(
            spec.data, [load_domain(replace(spec, data=p), preprocessing, seed, least_classes) for p in parts]
        )
    name, selection = parse_selection(spec.data)
    source = open_source(name)
    chosen = select_classes(source.classes, selection)
    require(
        len(chosen) >= least_classes,
        f"'{spec.data}' has one class ({source.classes[chosen[0]]}); classification needs at least {least_classes}",
    )
    train = _pick(source.train, chosen, None, source, seed, "train")
    test, validation = source.test, source.validation
    held: dict[str, dict[int, Labels]] = {}
    if test is None:
        train, held["test"] = _split_off(train, spec.test_fraction)
    else:
        held["test"] = _pick(test, chosen, None, source, seed, "test")
    train = {c: t[: spec.per_class] for c, t in train.items()}
    if validation is None:
        train, held["validation"] = _split_off(train, spec.validation_fraction)
    else:
        held["validation"] = _pick(validation, chosen, spec.test_per_class, source, seed, "validation")
    held["test"] = {c: t[: spec.test_per_class] for c, t in held["test"].items()}
    data = {
        "train": _decode(source.train, train, chosen, preprocessing),
        "validation": _decode(validation or source.train, held["validation"], chosen, preprocessing),
        "test": _decode(test or source.train, held["test"], chosen, preprocessing),
    }
    if spec.invert:
        data = {n: replace(d, images=255 - d.images) for n, d in data.items()}
    checked, again = _without_duplicates(data["validation"], (data["test"],))
    kept, dropped = _without_duplicates(data["train"], (checked, data["test"]))
    names = tuple(source.classes[c] for c in chosen)
    return Domain(spec.data, names, kept, checked, data["test"], dropped + again)


def public_name(data: str) -> str:
    """A domain's name for others: of a path on this machine only the last part."""
    if len(parts_of(data)) > 1:
        return " + ".join(map(public_name, parts_of(data)))
    name, selection = parse_selection(data)
    kind, _, rest = name.rpartition(":")
    short = name if kind in ("hf", "torchvision") or "/" not in rest else Path(rest).name
    return short if selection is None else f"{short}[{selection}]"


def parts_of(text: str) -> list[str]:
    """`"usps + mnist_m[0-4]"` → `["usps", "mnist_m[0-4]"]`: the domains that one names, a plus between blanks."""
    return [p.strip() for p in re.split(r"\s\+\s", text)]


def _joined(name: str, domains: list[Domain]) -> Domain:
    """All images of several domains; classes by name, in the order of their first appearance."""
    names = tuple(dict.fromkeys(c for d in domains for c in d.classes))

    def together(part: str) -> ImageData:
        data: list[ImageData] = [getattr(d, part) for d in domains]
        places = [torch.tensor([names.index(c) for c in d.classes]) for d in domains]
        labels = torch.cat([place[one.labels] for place, one in zip(places, data, strict=True)])
        return replace(data[0], images=torch.cat([one.images for one in data]), labels=labels)

    test = together("test")
    validation, again = _without_duplicates(together("validation"), (test,))
    train, dropped = _without_duplicates(together("train"), (validation, test))
    return Domain(name, names, train, validation, test, dropped + again + sum(d.dropped for d in domains))


def parse_selection(text: str) -> tuple[str, str | None]:
    """`"cifar10[0-4]"` → `("cifar10", "0-4")`."""
    match = re.fullmatch(r"(?P<name>[^\[\]]+)(\[(?P<selection>[^\[\]]*)\])?", text.strip())
    if match is None:
        raise UserError(f"cannot read the domain '{text}'; expected NAME or NAME[CLASSES], such as cifar10[0-4]")
    return match["name"], match["selection"]


def select_classes(classes: tuple[str, ...], selection: str | None) -> list[int]:
    """Indices for a selection: class names, numbers and ranges, separated by commas; names win over numbers."""
    if selection is None:
        return list(range(len(classes)))
    chosen: list[int] = []
    for item in (s.strip() for s in selection.split(",")):
        span = re.fullmatch(r"(\d+)\s*-\s*(\d+)", item)
        if item in classes:
            chosen.append(classes.index(item))
        elif span and int(span[1]) <= int(span[2]) < len(classes):
            chosen += range(int(span[1]), int(span[2]) + 1)
        elif item.isdigit() and int(item) < len(classes):
            chosen.append(int(item))
        else:
            some = ", ".join(classes[:12]) + (", …" if len(classes) > 12 else "")
            raise UserError(f"no class '{item}' among {len(classes)}; valid: 0-{len(classes) - 1}, or {some}")
    require(len(set(chosen)) == len(chosen), f"class selection '[{selection}]' names a class twice")
    return chosen


def _pick(
    split: Split, chosen: Iterable[int], most: int | None, source: Source, seed: int, part: str
) -> dict[int, Labels]:
    """At most `most` indices of each chosen class, in a seeded order."""
    picked = {}
    for c in chosen:
        where = np.flatnonzero(split.labels == c)
        require(len(where) > 0, f"{source.name}: class '{source.classes[c]}' has no {part} images")
        order = torch.randperm(len(where), generator=generator(seed, "pick", source.name, part, c)).numpy()
        picked[c] = where[order][:most]
    return picked


def _split_off(picked: dict[int, Labels], fraction: float) -> tuple[dict[int, Labels], dict[int, Labels]]:
    """Cut a stratified part off: at least one image of each class goes, at least one stays."""
    rest, part = {}, {}
    for c, where in picked.items():
        require(len(where) >= 2, f"class {c} has {len(where)} image; at least 2 are needed to split off held-out data")
        n = min(max(1, round(len(where) * fraction)), len(where) - 1)
        part[c], rest[c] = where[:n], where[n:]
    return rest, part


def _decode(split: Split, picked: dict[int, Labels], chosen: list[int], preprocessing: Preprocessing) -> ImageData:
    images, labels = [], []
    for label, c in enumerate(chosen):
        for i in picked[c].tolist():
            try:
                images.append(preprocessing.fit(split.open(i)))
            except UserError:
                raise
            except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, its own DecompressionBomb …
                raise UserError(f"cannot decode {split.where(i)}: {one_line(error, 120)}") from error
            labels.append(label)
    return ImageData(torch.stack(images), torch.tensor(labels), preprocessing)


def _without_duplicates(train: ImageData, held: Iterable[ImageData]) -> tuple[ImageData, int]:
    """Drop images whose pixels occur again: in the held-out data `held`, or earlier in these data themselves (they
    would otherwise fall into both halves)."""
    seen = {d for data in held for d in data.digests()}
    keep = []
    for i, digest in enumerate(train.digests()):
        if digest not in seen:
            keep.append(i)
            seen.add(digest)
    require(
        bool(keep), "all images of a split occur in the other splits too: training, validation and test must differ"
    )
    return train.subset(torch.tensor(keep, dtype=torch.int64)), len(train) - len(keep)


def sample(data: ImageData, count: int | None, seed: int) -> ImageData:
    """`count` images at random, spread over the classes as evenly as they allow; None: all of them.

    The adversary's draw: each audit seed has its own, so that the spread over seeds is that over data too.
    """
    if count is None:
        return data
    classes = torch.unique(data.labels.cpu()).tolist()
    require(
        len(classes) <= count <= len(data),
        f"the adversary's images must number between {len(classes)} (one a class) and {len(data)} (half of the "
        f"training data), but got {count}",
    )
    order = [_shuffled(data.labels, c, generator(seed, "sample", c)) for c in classes]
    return data.subset(torch.cat(_take_evenly(order, count)))


def _shuffled(labels: Tensor, c: int, rng: torch.Generator) -> Tensor:
    where = torch.nonzero(labels == c).flatten().cpu()
    return where[torch.randperm(len(where), generator=rng)]


def _take_evenly(parts: list[Tensor], total: int) -> list[Tensor]:
    """The first n_c of each part, Σ n_c = total, the n_c as equal as the parts' lengths allow."""
    counts = [0] * len(parts)
    while sum(counts) < total:
        open_parts = [i for i, p in enumerate(parts) if counts[i] < len(p)]
        smallest = min(open_parts, key=lambda i: counts[i])
        counts[smallest] += 1
    return [p[:n] for p, n in zip(parts, counts, strict=True)]


def holdout(labels: Tensor, fraction: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of two disjoint, stratified parts, at random: to adapt on, and `fraction` of each class (at least one
    sample) to evaluate on. Raises `UserError` for a class of one sample."""
    adapt, evaluate = [], []
    for c in torch.unique(labels.cpu()).tolist():
        where = _shuffled(labels, c, rng)
        require(len(where) >= 2, f"class {c} has one image in the defender's half; simulation needs at least 2")
        n = min(max(1, round(len(where) * fraction)), len(where) - 1)
        evaluate.append(where[:n])
        adapt.append(where[n:])
    return torch.cat(adapt), torch.cat(evaluate)
