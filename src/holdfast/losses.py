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
