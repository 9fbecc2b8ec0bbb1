"""Edits for diffusion models: of the noise schedule, of the prediction target, of the data (prior preservation)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from holdfast.attacks.released import WEIGHTS_ONLY, Means, Released, Restructured, described
from holdfast.attacks.structure import StructureEdit
from holdfast.diffusion.denoisers import Denoiser
from holdfast.diffusion.sampling import STEPS, sample_images
from holdfast.errors import require
from holdfast.flops import training_flops

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


class _Exchange(StructureEdit, ABC):
    """What both have in common: the weights stay, and whoever trains from scratch is free to choose the same."""

    fresh: ClassVar[bool] = True

    @abstractmethod
    def setting(self, model: Denoiser) -> dict[str, str | None]:
        """What changes in the scheduler's configuration; nothing where the model has it already."""

    def obstacle(self, released: Released) -> str | None:
        """Only for diffusion models that are not like that already."""
        model = released.architecture.build(released.classes)
        if not isinstance(model, Denoiser):
            return "not a diffusion model"
        return None if self.setting(model) else "the model has it already"

    def apply(self, released: Released, means: Means) -> Released:
        """The same weights; the levels at which the model is measured stay those of its own schedule."""
        model = released.architecture.build(released.classes)
        if not isinstance(model, Denoiser):
            raise TypeError(f"expected a Denoiser, got {type(model).__name__}")
        change = _Exchanged(tuple(self.setting(model).items()))
        factory = Restructured(released.architecture, change)
        return replace(released, architecture=replace(released.architecture, factory=factory))


@dataclass(frozen=True)
class AnotherSchedule(_Exchange):
    """Train under another noise schedule; where none is named, the cosine, or for a model that has it the linear."""

    schedule: str | None = None
    name: Literal["another-schedule"] = "another-schedule"

    def __post_init__(self) -> None:
        if self.schedule is not None:
            require(
                self.schedule in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}, got '{self.schedule}'"
            )

    def setting(self, model: Denoiser) -> dict[str, str | None]:
        """The schedule of β, in place of a list of them too."""
        config = model.scheduler.config
        own = "trained" if config.get("trained_betas") is not None else config.beta_schedule
        other = self.schedule or ("linear" if own == "squaredcos_cap_v2" else "squaredcos_cap_v2")
        lists = {"trained_betas": None} if own == "trained" else {}
        return {} if own == other else {"beta_schedule": other, **lists}


@dataclass(frozen=True)
class AnotherTarget(_Exchange):
    """Train the network to predict v where it predicted ε, or ε where it predicted v."""

    name: Literal["another-target"] = "another-target"

    def setting(self, model: Denoiser) -> dict[str, str | None]:
        """The other prediction type."""
        return {"prediction_type": "v_prediction" if model.prediction == "epsilon" else "epsilon"}


@dataclass(frozen=True)
class _Exchanged:
    setting: tuple[tuple[str, str | None], ...]

    def __call__(self, model: nn.Module) -> nn.Module:
        if not isinstance(model, Denoiser):
            raise TypeError(f"expected a Denoiser, got {type(model).__name__}")
        model.exchange(type(model.scheduler).from_config(model.scheduler.config, **dict(self.setting)))
        return model


@dataclass(frozen=True)
class PriorPreservation:
    """DreamBooth's prior preservation (CVPR 2023): as many samples of the released model as images, mixed in.

    Few images are learned by heart; what the model itself makes, learned again beside them, keeps it general. At least
    `least` of each: fewer images are repeated. DreamBooth's weight of 1 for both losses is an equal share of both.
    """

    least: int = 64
    name: Literal["prior-preservation"] = "prior-preservation"
    needs: ClassVar[str] = WEIGHTS_ONLY
    revives: ClassVar[bool] = False
    carries: ClassVar[bool] = False
    fresh: ClassVar[bool] = False  # a model from scratch has no prior
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(self.least >= 1, f"least must be at least 1, but got {self.least}")

    def obstacle(self, released: Released) -> str | None:
        """Only for diffusion models."""
        model = released.architecture.build(released.classes)
        return None if isinstance(model, Denoiser) else "not a diffusion model"

    def summary(self) -> str:
        """One line."""
        return described(self)

    def apply(self, released: Released, means: Means) -> Released:
        """The weights as they are; the attacker's images with samples beside them."""
        model = released.build(means.runtime)
        if not isinstance(model, Denoiser):
            raise TypeError(f"expected a Denoiser, got {type(model).__name__}")
        few = means.restricted
        count = max(len(few), self.least)
        prior = few.preprocessing.restore(sample_images(model, count, few.images.shape[1:], means.runtime))
        images, labels = few.subset(torch.arange(count) % len(few)), self._labels(model, count)
        means.restricted = replace(
            images,
            images=torch.cat([images.images, prior.to(images.images)]),
            labels=torch.cat([images.labels, labels.to(images.labels)]),
        )
        means.flops += count * STEPS * training_flops(model.requires_grad_(False), means.images(1))
        return released

    @staticmethod
    def _labels(model: Denoiser, count: int) -> Tensor:
        """The class of each sample: a conditional model samples one class after another, as `sample_images` does."""
        return torch.arange(count) % model.classes if model.conditional else torch.zeros(count)
