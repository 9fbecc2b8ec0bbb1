"""How an image becomes what a model takes: size, grey or colour, normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from holdfast.errors import require


@dataclass(frozen=True)
class Preprocessing:
    """The input a model expects: square images of `size` pixels, `channels` 1 (grey) or 3 (colour), per-channel
    `mean` and `std` on the scale [0, 1] (one number stands for all channels)."""

    size: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        require(4 <= self.size <= 1024, f"image size must be in [4, 1024], but got {self.size}")
        require(self.channels in (1, 3), f"channels must be 1 (grey) or 3 (colour), but got {self.channels}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            require(
                len(values) in (1, self.channels),
                f"{name} must hold 1 or {self.channels} numbers, but got {len(values)}",
            )
        require(all(s > 0 for s in self.std), f"std must be positive, but got {self.std}")

    def fit(self, image: Image.Image) -> Tensor:
        """Any Pillow image as uint8 (channels, size, size): shorter side resized, centre cropped, grey or colour."""
        if image.mode.startswith("I;16") or image.mode == "I":  # convert("L") would clip 16-bit values
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        image = image.convert("L" if self.channels == 1 else "RGB")
        width, height = image.size
        if (width, height) != (self.size, self.size):
            scale = self.size / min(width, height)
            width, height = max(self.size, round(width * scale)), max(self.size, round(height * scale))
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = (width - self.size) // 2, (height - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
        array = np.array(image, dtype=np.uint8)
        array = array[None] if self.channels == 1 else array.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(array))

    def restore(self, images: Tensor) -> Tensor:
        """Normalised images (n, c, h, w) as uint8 in [0, 255]: what `normalise` began with."""
        mean, std = (_channels(values, images.device) for values in (self.mean, self.std))
        return images.float().mul(std).add(mean).mul(255).round().clamp(0, 255).to(torch.uint8)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (n, c, h, w) in [0, 255] to float32, (x/255 − mean)/std."""
        mean, std = (_channels(values, images.device) for values in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(1, c, 1, 1) on the device, where it is sent once and not with every batch."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)
