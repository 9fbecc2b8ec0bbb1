"""A labelled image set whose images are decoded only when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Labels = npt.NDArray[np.int64]
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


def array_split(images: npt.NDArray[np.uint8], labels: Any, name: str) -> Split:
    """A split over uint8 images in memory, shape (n, h, w) or (n, h, w, 3)."""
    return Split(
        np.asarray(labels, dtype=np.int64), lambda i: Image.fromarray(images[i]), lambda i: f"image {i} of {name}"
    )


def numbered(split: Split) -> tuple[str, ...]:
    """Class names where there are none: "0" … the largest label."""
    return tuple(str(i) for i in range(int(split.labels.max()) + 1))
