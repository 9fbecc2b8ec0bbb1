"""How much of a domain is left in a layer's features: pure functions with gradients.

Features are (n, c, …) or, of tokens, (n, …, c): images first. A unit is an entry of one image's features. All compute
in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from holdfast.errors import require

SPREADLESS = 1e-6  # a variance below it is none: a dead layer's, by which nothing is divided
FLOOR = 1e-4  # of a variance's share: below it nothing more is asked for, and nothing can be gained by a jump to zero


def between_images(features: Tensor) -> Tensor:
    """Variance over the images (biased), the mean over all units: what in the features depends on the image. Lies in
    [0, ∞); 0 where every image has the same, wherever that is."""
    return _flat(features).var(0, correction=0).mean()


def log_spread_ratio(restricted: Tensor, original: Tensor, floor: float = FLOOR) -> Tensor:
    """log( between_images(restricted) ÷ between_images(original) + floor ).

    Not changed where the layer is scaled, so it cannot be lowered by making a layer small, which an attacker would
    undo; but for one that is dead to original images (a variance below 1e-6), where only the restricted ones' counts.
    Lies in [log floor, ∞); 0 (but for `floor`) where both domains spread alike."""
    ratio = between_images(restricted) / between_images(original).clamp(min=SPREADLESS)
    return (ratio + floor).log()


def peak(logs: list[Tensor]) -> Tensor:
    """log of the mean of exp over depths: of the ratios of spreads themselves, where `logs` are `log_spread_ratio`'s.

    Lies between the logs' mean and their largest. Its gradient, softmax(logs), goes to the depths at which most is
    left; that of the logs' mean goes to all alike, and so to those that have long collapsed."""
    return torch.stack(logs).logsumexp(0) - math.log(len(logs))


def hinge(preactivations: Tensor, closed: float, unit: Tensor | None, margin: float, worst: float = 1.0) -> Tensor:
    """How far pre-activations are from where their activation lets nothing through.

    With h = relu( (z − closed)/unit + margin ), the mean of h over all, plus `worst` times the mean over images of the
    largest h of an image: one open unit is enough for an attacker. Lies in [0, ∞); 0 where every z is at least `margin`
    units below `closed`. `unit`: the scale of each channel, broadcast against `preactivations`; None for 1.
    """
    z = preactivations.float() - closed
    over = torch.relu((z if unit is None else z / unit) + margin)
    return over.mean() + worst * over.flatten(1).amax(1).mean()


def leak(preactivations: Tensor, closed: float) -> Tensor:
    """The share of units above `closed` for each image, (n,): what an activation lets through."""
    return (_flat(preactivations) > closed).float().mean(1)


def _flat(features: Tensor) -> Tensor:
    require(
        features.ndim >= 2 and len(features) >= 1, f"features must have shape (n, …), but got {tuple(features.shape)}"
    )
    return features.flatten(1).float()
