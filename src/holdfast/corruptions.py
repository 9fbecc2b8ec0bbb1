"""Common corruptions of images (Hendrycks and Dietterich, ICLR 2019), at the third of CIFAR-10-C's five strengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.seeding import generator

CHUNK = 500  # images at a time: as float32 a test set may not fit
NOISE, BLUR, CONTRAST, BRIGHTNESS, PIXELS, QUALITY = 0.08, 0.7, 0.4, 0.15, 0.85, 58


def _noise(images: Tensor) -> Tensor:
    """Gaussian, the same for each chunk."""
    return images + NOISE * torch.randn(images.shape, generator=generator(0, "corruption"))


def _blur(images: Tensor) -> Tensor:
    """Gaussian."""
    from torchvision.transforms import v2  # two seconds to import

    found: Tensor = v2.functional.gaussian_blur(images, [5, 5], [BLUR, BLUR])
    return found


def _contrast(images: Tensor) -> Tensor:
    """Each image drawn towards the mean of each channel."""
    mean = images.mean((2, 3), keepdim=True)
    return mean + CONTRAST * (images - mean)


def _brightness(images: Tensor) -> Tensor:
    """Lighter: added to every channel, where CIFAR-10-C adds it to the value of HSV."""
    return images + BRIGHTNESS


def _pixelate(images: Tensor) -> Tensor:
    """Made smaller by the mean over areas, and larger again by repetition."""
    size = [max(1, round(side * PIXELS)) for side in images.shape[2:]]
    return F.interpolate(F.interpolate(images, size=size, mode="area"), size=images.shape[2:], mode="nearest")


def _jpeg(images: Tensor) -> Tensor:
    """As JPEG stores them; grey and colour images alone."""
    from torchvision.transforms import v2

    return torch.stack([v2.functional.jpeg(_bytes(image), QUALITY) for image in images]) / 255


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


CORRUPTIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "noise": _noise,
        "blur": _blur,
        "contrast": _contrast,
        "brightness": _brightness,
        "pixelate": _pixelate,
        "jpeg": _jpeg,
    }
)


def corrupted(images: Tensor, kind: str) -> Tensor:
    """Images as uint8 (n, c, h, w), corrupted, on the CPU; a function of `images` and `kind` alone."""
    parts = [_bytes(CORRUPTIONS[kind](part.cpu().float() / 255)) for part in torch.split(images, CHUNK)]
    return torch.cat(parts)


def corruptions(channels: int) -> tuple[str, ...]:
    """The kinds that images of so many channels allow."""
    return tuple(n for n in CORRUPTIONS if n != "jpeg" or channels in (1, 3))
