"""How much of a domain is left in a layer's features: pure functions with gradients.

Features are (n, c, …) or, of tokens, (n, …, c): images first. A unit is an entry of one image's features. All compute
in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from holdfast.errors import require

SPREADLESS = 1e-6  # a variance below it is none: a dead layer's, by which nothing is divided
FLOOR = 1e-4  # of a variance's share: below it nothing more is asked for, and nothing can be gained by a jump to zero


def between_images(features: Tensor) -> Tensor:
    """Variance over the images (biased), the mean over all units: what in the features depends on the image. Lies in
    [0, ∞); 0 where every image has the same, wherever that is."""
    found: Tensor = _Between.apply(_by_image(features))
    return found


class _Between(torch.autograd.Function):
    """V = mean of c² with c = x − x̄, and dV/dx = 2·c ÷ entries, as Σ c = 0: one pass each way, and what is kept has the
    features' own type. Left to autograd it took a sixth of a step of Lockout on a ResNet."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        """The scalar, float32."""
        centred = features - features.mean(0, dtype=torch.float32)
        ctx.save_for_backward(centred.to(features.dtype))
        value: Tensor = torch.linalg.vector_norm(centred).square() / centred.numel()
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """As the features."""
        (centred,) = ctx.saved_tensors
        found: Tensor = centred * (2 * gradient / centred.numel())
        return found.to(centred.dtype)


def log_spread_ratio(restricted: Tensor, original: Tensor, floor: float = FLOOR) -> Tensor:
    """log( between_images(restricted) ÷ between_images(original) + floor ). `original`: features, or what
    `between_images` says of them, a scalar.

    Not changed where the layer is scaled, so it cannot be lowered by making a layer small, which an attacker would
    undo; but for one that is dead to original images (a variance below 1e-6), where only the restricted ones' counts.
    Lies in [log floor, ∞); 0 (but for `floor`) where both domains spread alike."""
    spread = original if original.ndim == 0 else between_images(original)
    ratio = between_images(restricted) / spread.clamp(min=SPREADLESS)
    return (ratio + floor).log()


def peak(logs: list[Tensor]) -> Tensor:
    """log of the mean of exp over depths: of the ratios of spreads themselves, where `logs` are `log_spread_ratio`'s.

    Lies between the logs' mean and their largest. Its gradient, softmax(logs), goes to the depths at which most is
    left; that of the logs' mean goes to all alike, and so to those that have long collapsed."""
    return torch.stack(logs).logsumexp(0) - math.log(len(logs))


def reopened(features: Tensor, spread: Tensor | float, most: float = 100.0) -> Tensor:
    """The same images, told apart as well as others are: x̄ + k·(x − x̄) with x̄ the mean over images and
    k = √(`spread` ÷ between_images(x)), at least 1 and at most `most`.

    What has collapsed beside its mean is brought back as an attacker's first steps bring it back, without taking them:
    whatever difference is left, however small, becomes as large as `spread`. k is a constant to the gradient. Has the
    shape and type of `features`."""
    values = features.float()
    mean = values.mean(0, keepdim=True)
    scale = (spread / between_images(features).clamp(min=SPREADLESS**2)).sqrt().clamp(1, most).detach()
    return (mean + scale * (values - mean)).to(features.dtype)


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
    return _by_image(features).float()


def _by_image(features: Tensor) -> Tensor:
    """(n, units), in the order in which they lie in memory."""
    require(
        features.ndim >= 2 and len(features) >= 1, f"features must have shape (n, …), but got {tuple(features.shape)}"
    )
    if features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last):
        features = features.permute(0, 2, 3, 1)
    return features.flatten(1)
