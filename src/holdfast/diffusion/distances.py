"""How far samples are from real images: KID by torchmetrics, in Inception's features where their weights are on disk,
else in those of a network of random weights."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import require
from holdfast.seeding import seeded

INCEPTION = "weights-inception-2015-12-05-6526542c.pth"
LEAST = 4  # images on either side
NAMES = {True: "KID (Inception)", False: "kernel distance (random features)"}


class RandomFeatures(nn.Module):
    """Features of images by a fixed network of random weights: three strided convolutions, means and deviations of
    each channel over the image after each; 2·(32 + 64 + 128) numbers.

    No learned notion of likeness: colours, contrasts and textures. Told apart are images that differ in these.
    """

    num_features = 448

    def __init__(self) -> None:
        super().__init__()
        with seeded(0, "random features"):
            self.layers = nn.ModuleList([nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 32), (32, 64), (64, 128))])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (n, 3, h, w) to float32 (n, 448)."""
        values, found = images.float() / 127.5 - 1, []
        for layer in self.layers:
            values = F.leaky_relu(layer(values), 0.2) * 2
            flat = values.flatten(2)
            found += [flat.mean(2), flat.std(2, correction=0)]
        return torch.cat(found, 1)


def inception_weights() -> Path | None:
    """Where torch-fidelity's Inception lies, if it lies anywhere and the package is there: nothing is downloaded."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    return path if path.is_file() and find_spec("torch_fidelity") else None


def distance(samples: Tensor, real: Tensor) -> float:
    """KID (Bińkowski et al., ICLR 2018), the unbiased MMD² under (xᵀy/d + 1)³, between two sets of uint8 images
    (n, c, h, w). Around 0 for equal distributions; the mean over 20 random halves of the smaller set."""
    require_torchmetrics()
    from torchmetrics.image.kid import KernelInceptionDistance

    count = min(len(samples), len(real))
    require(
        count >= LEAST, f"a distance needs at least {LEAST} images on both sides, got {len(samples)} and {len(real)}"
    )
    feature: Any = 2048 if inception_weights() else RandomFeatures()
    with seeded(0, "kid"):
        with warnings.catch_warnings():  # that features are kept in memory: a few hundred
            warnings.simplefilter("ignore")
            metric = KernelInceptionDistance(feature=feature, subsets=20, subset_size=count // 2)
        metric.update(_colour(real), real=True)
        metric.update(_colour(samples), real=False)
        mean, _ = metric.compute()
    return float(mean)


def require_torchmetrics() -> None:
    """`UserError` where it is not installed."""
    found = find_spec("torchmetrics") is not None
    require(found, "distances of samples need torchmetrics: pip install 'holdfast[diffusion]'")


def _colour(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
