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
from torch import Tensor, nn

from holdfast import losses
from holdfast.diffusion.denoisers import Denoiser
from holdfast.errors import require, unknown
from holdfast.scales import ACCURACY, Scale

Loss = Callable[[Tensor, Tensor], Tensor]


class Task(Protocol):
    """The interface of a task. `outputs` are what `forward` returns, `targets` what the data holds."""

    @property
    def scale(self) -> Scale:
        """The metric and how it is read; it is at most 1, and higher is better for the one who trains."""
        ...

    @property
    def name(self) -> str:
        """As recipes call it."""
        ...

    @property
    def labelled(self) -> bool:
        """Whether outputs are logits over labels."""
        ...

    @property
    def generates(self) -> bool:
        """Whether the model makes images that an audit can show."""
        ...

    @property
    def least_classes(self) -> int:
        """How many classes a domain needs."""
        ...

    def check(self, model: nn.Module, example: Tensor | None = None) -> None:
        """`UserError` where a model is none for this task, or cannot work on inputs like `example`."""
        ...

    def fitted(self, model: nn.Module, images: Tensor) -> Task:
        """The task with what depends on the model or the images: what counts as chance."""
        ...

    def forward(self, model: nn.Module, inputs: Tensor, targets: Tensor, first: int | None = None) -> Tensor:
        """What loss and score are made of. `first`: the place of the first sample in the data that are evaluated;
        None in training, where a task may draw from torch's generators."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Training loss, a float32 scalar."""
        ...

    def beside(self, model: nn.Module, teacher: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` returns in training, and from the same pass how far the model's answers are from the
        teacher's, a float32 scalar; only the model's have a gradient."""
        ...

    def suppression(self, name: str | None) -> Loss:
        """A suppression loss by name, None for the task's own; `UserError` for one that does not fit the task."""
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

    scale: ClassVar[Scale] = ACCURACY
    name: ClassVar[str] = "classification"
    labelled: ClassVar[bool] = True
    generates: ClassVar[bool] = False
    least_classes: ClassVar[int] = 2
    SUPPRESSION: ClassVar[Mapping[str, Loss]] = MappingProxyType(
        {
            "ice": losses.inverse_cross_entropy,
            "klu": losses.kl_from_uniform,
            "ice_logits": losses.inverse_logits_cross_entropy,
        }
    )

    def check(self, model: nn.Module, example: Tensor | None = None) -> None:
        """Any network may classify, but one that tells noise."""
        require(not isinstance(model, Denoiser), "this is a diffusion model; give the recipe task: denoising")

    def fitted(self, model: nn.Module, images: Tensor) -> Classification:
        """As it is: chance is a matter of the labels."""
        return self

    def forward(self, model: nn.Module, inputs: Tensor, targets: Tensor, first: int | None = None) -> Tensor:
        """The logits."""
        logits: Tensor = model(inputs)
        return logits

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in float32 whatever the logits are."""
        return F.cross_entropy(outputs.float(), targets)

    def beside(self, model: nn.Module, teacher: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, and KL(teacher ‖ model)."""
        with torch.no_grad():
            answers = teacher(inputs)
        logits: Tensor = model(inputs)
        return logits, losses.distillation(logits, answers)

    def suppression(self, name: str | None) -> Loss:
        """`ice` (Eq. 11; the default), `klu` (Eq. 13) or `ice_logits` (SOPHON's published code)."""
        return chosen_loss(self.SUPPRESSION, name)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1 where the largest logit is the label's and finite, else 0: a model full of NaN knows nothing."""
        right = outputs.argmax(1) == targets
        return (right & outputs.float().isfinite().all(1)).float()

    def chance(self, targets: Tensor) -> float:
        """The share of the most frequent class: 1/C where classes are balanced."""
        return float(torch.bincount(targets).max() / len(targets))


def chosen_loss(table: Mapping[str, Loss], name: str | None) -> Loss:
    """The loss of that name, or the first of the table."""
    if name is None:
        return next(iter(table.values()))
    if name not in table:
        raise unknown("suppression loss", name, table)
    return table[name]
