"""Image sets of torchvision, by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import UserError, one_line, unknown
from holdfast.files import one_at_a_time
from holdfast.imagesets import Source, Split, numbered

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
            with one_at_a_time(root / ".lock"):  # torchvision writes straight to where others would read
                parts.append(getattr(tv, cls)(root=str(root), download=True, **kwargs))
        except Exception as error:  # no network, checksum, missing reader package: one line for all
            raise UserError(
                f"cannot get {cls} from torchvision: {one_line(error, 160)} (a folder of Parquet sets in HOLDFAST_DATA "
                "needs no download)"
            ) from error
    splits = [_torchvision_split(p, name, attribute) if p is not None else None for p in parts]
    train = splits[0]
    classes = ("no", "yes") if cls == "CelebA" else getattr(parts[0], "classes", None)
    if train is None:
        raise UserError(f"{cls} has no training split")
    names = tuple(_text(c) for c in classes) if classes else numbered(train)
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
    if labels.ndim == 2:  # QMNIST: the label and seven facts about the writer
        labels = labels[:, 0]
    return Split(labels.astype(np.int64), lambda i: data[i][0], lambda i: f"image {i} of {name}")
