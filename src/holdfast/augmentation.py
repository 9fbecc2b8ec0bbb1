"""What an adversary does to its few images: random shifts, flips, mixup; a batch at a time, seeded by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import unknown
from holdfast.seeding import seeded
from holdfast.training import Batch

AUGMENTATIONS = ("none", "shift", "shift+flip")


def check_augmentation(kind: str) -> None:
    """`UserError` for one that there is not."""
    if kind not in AUGMENTATIONS:
        raise unknown("augmentation", kind, AUGMENTATIONS)


def shifted(images: Tensor, most: int, flip: bool) -> Tensor:
    """Each of the images (n, c, h, w) moved by −`most` … `most` pixels along both sides, edges repeated; with `flip`
    half of them mirrored. Draws from the CPU's global generator."""
    count, channels, height, width = images.shape
    padded = F.pad(images, (most, most, most, most), mode="replicate")
    down, right = torch.randint(2 * most + 1, (2, count, 1)).to(images.device)
    rows = (down + torch.arange(height, device=images.device)).view(count, 1, height, 1)
    columns = right + torch.arange(width, device=images.device)
    if flip:
        mirrored = (torch.rand(count, 1) < 0.5).to(images.device)
        columns = torch.where(mirrored, columns.flip(1), columns)
    every = torch.arange(count, device=images.device).view(count, 1, 1, 1)
    planes = torch.arange(channels, device=images.device).view(1, channels, 1, 1)
    return padded[every, planes, rows, columns.view(count, 1, 1, width)]


def augmented(
    batches: Iterable[Batch], kind: str, mixup: float, classes: int, seed: int, first_step: int = 0
) -> Iterator[Batch]:
    """The batches, each image shifted by up to an eighth of its side (`shift`; edges repeated) and mirrored half of
    the time (`shift+flip`); then mixed with another of its batch (Zhang et al., ICLR 2018; λ ~ Beta(`mixup`, `mixup`);
    0: not), whose labels become shares (n, classes). Batch i, from `first_step` on, is a function of `seed` and i."""
    if kind == "none" and not mixup:
        yield from batches
        return
    mix = None
    if mixup > 0:
        from torchvision.transforms import v2  # two seconds to import: only for those who mix

        mix = v2.MixUp(alpha=mixup, num_classes=classes)
    for step, (images, labels) in enumerate(batches, first_step):
        with seeded(seed, "augment", step):
            if kind != "none":
                layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else None
                images = shifted(images, max(1, images.shape[-1] // 8), flip=kind == "shift+flip")
                images = images.to(memory_format=layout) if layout else images
            if mix is not None:
                images, labels = mix(images, labels)
        yield images, labels
