"""Edits of what surrounds a diffusion model's network: its noise schedule, its prediction target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from holdfast.attacks.released import Means, Released, Restructured
from holdfast.attacks.structure import StructureEdit
from holdfast.diffusion.denoisers import Denoiser
from holdfast.errors import require

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


class _Exchange(StructureEdit, ABC):
    """What both have in common: the weights stay, and whoever trains from scratch is free to choose the same."""

    fresh: ClassVar[bool] = True

    @abstractmethod
    def setting(self, model: Denoiser) -> dict[str, str]:
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
    """Train under another noise schedule."""

    schedule: str = "squaredcos_cap_v2"
    name: Literal["another-schedule"] = "another-schedule"

    def __post_init__(self) -> None:
        require(self.schedule in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}, got '{self.schedule}'")

    def setting(self, model: Denoiser) -> dict[str, str]:
        """The schedule of β."""
        own = model.scheduler.config.beta_schedule
        return {} if own == self.schedule else {"beta_schedule": self.schedule}


@dataclass(frozen=True)
class AnotherTarget(_Exchange):
    """Train the network to predict v where it predicted ε, or ε where it predicted v."""

    name: Literal["another-target"] = "another-target"

    def setting(self, model: Denoiser) -> dict[str, str]:
        """The other prediction type."""
        return {"prediction_type": "v_prediction" if model.prediction == "epsilon" else "epsilon"}


@dataclass(frozen=True)
class _Exchanged:
    setting: tuple[tuple[str, str], ...]

    def __call__(self, model: nn.Module) -> nn.Module:
        if not isinstance(model, Denoiser):
            raise TypeError(f"expected a Denoiser, got {type(model).__name__}")
        model.exchange(type(model.scheduler).from_config(model.scheduler.config, **dict(self.setting)))
        return model
