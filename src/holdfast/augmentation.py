"""What an adversary does to its few images: random shifts, flips, mixup. torchvision's transforms, seeded by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from holdfast.seeding import seeded
from holdfast.training import Batch

AUGMENTATIONS = ("none", "shift", "shift+flip")


def augmented(batches: Iterable[Batch], kind: str, mixup: float, classes: int, seed: int) -> Iterator[Batch]:
    """The batches, each image shifted by up to an eighth of its side (`shift`; edges repeated) and mirrored half of
    the time (`shift+flip`); then mixed with another of its batch (Zhang et al., ICLR 2018; λ ~ Beta(`mixup`, `mixup`);
    0: not), whose labels become shares (n, classes). Batch i is a function of `seed` and i."""
    from torchvision.transforms import v2  # two seconds to import: only for those who augment

    mix = v2.MixUp(alpha=mixup, num_classes=classes) if mixup > 0 else None
    for step, (images, labels) in enumerate(batches):
        with seeded(seed, "augment", step):
            if kind != "none":
                crop = v2.RandomCrop(images.shape[-2:], padding=max(1, images.shape[-1] // 8), padding_mode="edge")
                flip = v2.RandomHorizontalFlip(0.5 if kind == "shift+flip" else 0.0)
                layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else None
                shifted = torch.stack([flip(crop(image)) for image in images])
                images = shifted.to(memory_format=layout) if layout else shifted
            if mix is not None:
                images, labels = mix(images, labels)
        yield images, labels
