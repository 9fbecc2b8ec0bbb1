"""Where images come from: built-in digits, class folders, Parquet, Hugging Face `datasets`, torchvision.

A source knows its labels at once and decodes an image only when asked, so a small subset of a large set is cheap.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from holdfast.errors import UserError, require, unknown
from holdfast.imagesets import SPLIT_FOLDERS, Source, Split, array_split
from holdfast.parquet import holds_images, open_hub, open_parquet, parquet_files
from holdfast.torchvision_sets import TORCHVISION, open_torchvision

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


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
    if name.lower().partition("/")[0] in TORCHVISION:
        return open_torchvision(name)
    if "/" in name or name.startswith("."):
        raise UserError(f"data not found: {name} (expected a folder of class folders, a Parquet file or folder)")
    hint = "; docs/recipes.md says where the recipes' data sets come from"
    hint += "" if data else "; set HOLDFAST_DATA to a folder of data sets to name them directly"
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
    local = sorted(p.name for p in data.iterdir() if holds_images(p)) if data else []
    return ["digits", *local]


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # 8×8 with values 0…16
    split = array_split(pixels, bunch.target, "digits")
    return Source("digits", tuple(str(n) for n in bunch.target_names), split)


def _open_path(path: Path) -> Source:
    if path.is_file() or parquet_files(path):
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


OPENERS: dict[str, Callable[[str], Source]] = {
    "folder": open_folder,
    "parquet": open_parquet,
    "hf": open_hub,
    "torchvision": open_torchvision,
}
