"""What is learned: its loss, its metric, its chance level, the suppression losses that fit it.

Nothing outside this file knows the modality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast import losses
from holdfast.errors import unknown

Loss = Callable[[Tensor, Tensor], Tensor]


class Task(Protocol):
    """The interface of a task. `outputs` are what the model returns, `targets` what the data holds."""

    @property
    def metric(self) -> str:
        """Name of the metric; it is in [0, 1] and higher is better for the one who trains."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Training loss, a float32 scalar."""
        ...

    def suppression(self, name: str) -> Loss:
        """A suppression loss by name; `UserError` for one that does not fit the task."""
        ...

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The metric's summand for each sample, shape (n,)."""
        ...

    def chance(self, targets: Tensor) -> float:
        """What a constant answer reaches on these targets."""
        ...


@dataclass(frozen=True)
class Classification:
    """Cross-entropy and accuracy over logits (n, C) and labels (n,) int64."""

    metric: str = "accuracy"

    SUPPRESSION: ClassVar[Mapping[str, Loss]] = MappingProxyType(
        {
            "ice": losses.inverse_cross_entropy,
            "klu": losses.kl_from_uniform,
            "ice_logits": losses.inverse_logits_cross_entropy,
        }
    )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in float32 whatever the logits are."""
        return F.cross_entropy(outputs.float(), targets)

    def suppression(self, name: str) -> Loss:
        """`ice` (Eq. 11), `klu` (Eq. 13) or `ice_logits` (SOPHON's published code)."""
        if name not in self.SUPPRESSION:
            raise unknown("suppression loss", name, self.SUPPRESSION)
        return self.SUPPRESSION[name]

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1 where the largest logit is the label's and finite, else 0: a model full of NaN knows nothing."""
        right = outputs.argmax(1) == targets
        return (right & outputs.float().isfinite().all(1)).float()

    def chance(self, targets: Tensor) -> float:
        """The share of the most frequent class: 1/C where classes are balanced."""
        return float(torch.bincount(targets).max() / len(targets))
