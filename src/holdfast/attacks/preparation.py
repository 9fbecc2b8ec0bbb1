"""Edits that train: healing on original data, a third domain first, distillation into a fresh student."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from holdfast.attacks.chains import outputs
from holdfast.attacks.released import ORIGINAL_DATA, THIRD_DOMAIN, WEIGHTS_ONLY, Means, Released, described
from holdfast.attacks.weights import Noise
from holdfast.domains import ImageData
from holdfast.errors import require
from holdfast.finetuning import FineTuning
from holdfast.flops import training_flops
from holdfast.losses import distillation
from holdfast.models import state_of
from holdfast.seeding import derive
from holdfast.training import Batch, plain


@dataclass(frozen=True)
class _Preparation:
    """What edits that train have in common: Adam at `lr` for a share `budget` of the audit's steps."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    budget: float = 0.5
    lr: float = 1e-3
    batch_size: int = 64
    revives: ClassVar[bool] = False
    carries: ClassVar[bool] = False
    fresh: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(0 < self.budget <= 100, f"budget must lie in (0, 100], but got {self.budget}")
        _ = self.tuning(1)  # raises for an lr or a batch size out of range

    def tuning(self, steps: int) -> FineTuning:
        """How it trains, given the audit's steps."""
        count = max(1, round(self.budget * steps))
        return FineTuning(optimiser="adam", lr=self.lr, weight_decay=0.0, batch_size=self.batch_size, steps=count)

    def obstacle(self, released: Released) -> str | None:
        """None: it applies to any model; whether the data are there is the audit's to say."""
        return None

    def summary(self) -> str:
        """One line."""
        return described(self)


@dataclass(frozen=True)
class Heal(_Preparation):
    """Perturb the weights, then train on a little original data: out of the trap, back to what the model could do.

    The idea of TransNTL (CVPR 2024), which regained up to 72 % of what such defences had taken.
    """

    noise: float = 0.1
    name: Literal["heal"] = "heal"
    needs: ClassVar[str] = ORIGINAL_DATA
    revives: ClassVar[bool] = True
    carries: ClassVar[bool] = False
    fresh: ClassVar[bool] = (
        True  # whoever has the data pre-trains on it: what they are worth is no merit of the weights
    )

    def apply(self, released: Released, means: Means) -> Released:
        """Noise, then fine-tuning with the released head, where that has the original domain's classes."""
        data = _given(means.original, ORIGINAL_DATA)
        noisy = Noise(scale=self.noise).apply(released, means) if self.noise else released
        return _trained_first(noisy, means, data, self.tuning(means.steps), "heal")


@dataclass(frozen=True)
class BenignFirst(_Preparation):
    """Fine-tune to a harmless third domain first (as ResAlign, NeurIPS 2025, warns), then to the restricted one."""

    name: Literal["benign-first"] = "benign-first"
    needs: ClassVar[str] = THIRD_DOMAIN
    fresh: ClassVar[bool] = True  # as for `heal`

    def apply(self, released: Released, means: Means) -> Released:
        """Train body and a head of its own; the released head is put back afterwards."""
        data = _given(means.benign, THIRD_DOMAIN)
        tuning = replace(self.tuning(means.steps), initialise="head")
        return _trained_first(released, means, data, tuning, "benign first")


@dataclass(frozen=True)
class Distil(_Preparation):
    """Teach a fresh student what the released model answers on the attacker's images, and go on with the student."""

    temperature: float = 4.0
    name: Literal["distil"] = "distil"
    needs: ClassVar[str] = WEIGHTS_ONLY

    def obstacle(self, released: Released) -> str | None:
        """Only for models that answer with logits."""
        model, example = released.architecture.build(released.classes), released.architecture.example()
        return None if outputs(model, example).ndim == 2 else "the model's answers are no logits"

    def apply(self, released: Released, means: Means) -> Released:
        """Hinton's loss: KL between softened answers, T² · KL(softmax(t/T) ‖ softmax(s/T))."""
        teacher = released.build(means.runtime).eval()
        student = means.runtime.place(released.architecture.build(released.classes, derive(means.seed, "student")))

        def taught(batches: Iterable[Batch]) -> Iterator[Batch]:
            for images, _ in batches:
                with torch.no_grad(), means.runtime.autocast():
                    answers = teacher(images)
                yield images, answers.float()

        def loss(outputs: Tensor, answers: Tensor) -> Tensor:
            return distillation(outputs, answers, self.temperature)

        tuning = self.tuning(means.steps)
        result = means.train(student, means.restricted, tuning, "distil", loss=loss, forward=plain, prepare=taught)
        asked = result.steps * min(tuning.batch_size, len(means.restricted))
        teacher.requires_grad_(False)
        means.flops += asked * training_flops(teacher, means.images(1))
        return released.having(student)


def _trained_first(released: Released, means: Means, data: ImageData, tuning: FineTuning, stream: str) -> Released:
    """Train on `data` with the released head, or with a new one where the tuning says so or the classes differ; a new
    head is used for that alone, and the released one put back."""
    classes = int(data.labels.max()) + 1
    anew = tuning.initialise == "head" or classes != released.classes
    tuning = replace(tuning, initialise="head" if anew else "keep")
    model = means.runtime.place(released.architecture.build(classes))
    tuning.initialise_from(model, released.state, released.architecture, classes, derive(means.seed, stream))
    means.train(model, data, tuning, stream)
    heads = tuple(f"{h}." for h in released.head()) if anew else ()
    trained = {n: v for n, v in state_of(model).items() if not heads or not n.startswith(heads)}
    return replace(released, state={**released.state, **trained})


def _given(data: ImageData | None, what: str) -> ImageData:
    require(data is not None, f"this attack needs {what}, and there is none")
    return data  # type: ignore[return-value]
