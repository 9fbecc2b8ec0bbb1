"""Suppression losses: pure functions, safe from p → 1 to p → 0 in float32 and bf16.

They are *minimised* by the defender on restricted data; unlike a negated cross-entropy, their gradients vanish as the
goal is reached (SOPHON, §4.3.1). All take logits of shape (n, C) in any floating type, compute in float32 and return a
float32 scalar, the mean over the batch.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import require


def inverse_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """ICE, SOPHON Equation 11: the mean of −log(1 − p_y), p = softmax(logits). Lies in [0, ∞); 0 where p_y = 0.

    With a = z_y − log Σ_{j≠y} exp z_j (the log-odds of class y) it is softplus(a): linear in a as p_y → 1, exp(a) as
    p_y → 0, with no subtraction of nearly equal numbers at either end. Its gradient is Equation 12: p_y for class y,
    −p_j·p_y/(1 − p_y) for the others.

    `labels`: (n,) int64 in [0, C), C ≥ 2.
    """
    scores = _scores(logits)
    own = scores.gather(1, labels.unsqueeze(1))
    others = scores.scatter(1, labels.unsqueeze(1), -math.inf).logsumexp(1, keepdim=True)
    return F.softplus(own - others).mean()


def kl_from_uniform(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """KLU, SOPHON Equation 13: the mean of KL(uniform ‖ p) = −log C − (1/C)·Σ_j log p_j. Lies in [0, ∞); 0 at p = 1/C.

    Its gradient is Equation 14: p_i − 1/C. Needs no labels (the argument is there so that all losses are called alike).
    """
    scores = _scores(logits)
    return -F.log_softmax(scores, dim=1).mean() - math.log(scores.shape[1])


def inverse_logits_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`ice_logits`: cross-entropy of the negated logits, −log softmax(−z)_y. Lies in [0, ∞).

    Not Equation 11, but what SOPHON's published code computes (cross-entropy of 1 − z; softmax ignores the 1).
    """
    return F.cross_entropy(-_scores(logits), labels)


def _scores(logits: Tensor) -> Tensor:
    require(
        logits.ndim == 2 and logits.shape[1] >= 2,
        f"a suppression loss takes logits of shape (n, C) with C ≥ 2, but got {tuple(logits.shape)}",
    )
    return logits.float()


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T²·KL(softmax(t/T) ‖ softmax(s/T)), the mean over the batch (Hinton et al., 2015). Lies in [0, ∞).

    `student`, `teacher`: logits (n, C) in any floating type; computed in float32."""
    ours, theirs = (F.log_softmax(_scores(x) / temperature, 1) for x in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def noise_error(outputs: Tensor) -> Tensor:
    """Mean squared error of each image, (n,) float32, from `outputs` (n, 2, …): predictions and what they should be
    (and further planes, which are not looked at)."""
    _require_planes(outputs, 2, "predictions and targets, (n, 2, …)")
    predicted, target = outputs[:, :2].float().unbind(1)
    return (predicted - target).square().flatten(1).mean(1)


def denial_of_service(outputs: Tensor, _: Tensor | None = None) -> Tensor:
    """DoS, SOPHON Equation 16: the mean of ‖f(x_t, t)‖², per element. Lies in [0, ∞); 0 where the network answers zero.

    Its gradient by an element of the prediction is 2·f̂ ÷ (number of elements), which fades as the goal is reached; the
    paper's sum over an image's elements differs by that constant. Neither labels nor the true noise are used.
    """
    _require_planes(outputs, 2, "predictions and targets, (n, 2, …)")
    return outputs[:, 0].float().square().mean()


def signal_weighted_denial_of_service(outputs: Tensor, _: Tensor | None = None) -> Tensor:
    """`dos_signal`, ours: the mean of ᾱ_t·‖f(x_t, t)‖², per element, with ᾱ_t the third plane of `outputs` (n, 3, …).

    Where nearly all of x_t is noise, nobody can tell an original image from a restricted one, and what Equation 16 asks
    for is paid by both: with weight w beside the MSE the best answer to either is ε/(1 + w). Where the image is seen,
    the two can be told apart. So each noise level counts by the share that the image has in it.
    """
    _require_planes(outputs, 3, "predictions, targets and the images' share, (n, 3, …)")
    predicted, share = outputs[:, 0].float(), outputs[:, 2].float()
    return (share * predicted.square()).mean()


def inverse_mse(outputs: Tensor, _: Tensor | None = None) -> Tensor:
    """`mse`: the mean squared error, negated. Lies in (−∞, 0], without a lower end: its gradient, −2·(f̂ − ε) per
    element (Equation 15), grows with success. What SOPHON's Figure 14 shows to diverge."""
    return -noise_error(outputs).mean()


def _require_planes(outputs: Tensor, least: int, what: str) -> None:
    require(
        outputs.ndim >= 3 and outputs.shape[1] >= least,
        f"a denoising loss takes {what}, but got {tuple(outputs.shape)}",
    )
