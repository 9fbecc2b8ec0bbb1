"""The edit that makes what hardly varies count in full: batch normalisation put before every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from holdfast.attacks.released import Means, Released, Restructured
from holdfast.attacks.structure import StructureEdit
from holdfast.layers import WEIGHT_LAYERS, executed_layers
from holdfast.models import load_state, state_of


@dataclass(frozen=True)
class Standardise(StructureEdit):
    """Put a batch normalisation without weights before every weight layer but the first, so that what little a layer
    lets vary counts in full.

    Against defences that leave the restricted domain's variation small beside its mean: information that is badly
    conditioned comes back, information that is lost does not. What varies by a thousandth of its mean is rounded away
    in bf16, so whoever makes this edit computes in float32.
    """

    name: Literal["standardise"] = "standardise"
    carries: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    fresh: ClassVar[bool] = True

    def obstacle(self, released: Released) -> str | None:
        """Only for models of several layers."""
        return None if self._layers(released) else "the model has one weight layer alone"

    def _layers(self, released: Released) -> tuple[str, ...]:
        model = released.architecture.build(released.classes)
        order = executed_layers(model, released.architecture.example(2))
        return tuple(n for n in order if isinstance(model.get_submodule(n), WEIGHT_LAYERS))[1:]

    @torch.no_grad()
    def apply(self, released: Released, means: Means) -> Released:
        """The same weights; statistics of the new normalisations from up to 256 images."""
        layers = self._layers(released)
        factory = Restructured(released.architecture, _Standardised(layers))
        architecture = replace(released.architecture, factory=factory)
        model = means.runtime.place(architecture.build(released.classes)).eval()
        load_state(model, {**model.state_dict(), **released.state})
        standards: list[Any] = [model.get_submodule(f"{name}.{_STANDARD}") for name in layers]
        for standard in standards:  # in training each hands on what it has normalised: one pass for all
            standard.train().norm.momentum = 1.0
        model(means.images())
        for standard in standards:
            standard.eval().norm.momentum = 0.1
            spread = standard.norm.running_var
            spread[spread < standard.norm.eps] = 1.0  # what never varies stays as it is
        return Released(architecture, state_of(model), released.classes)


_STANDARD = "standard"


@dataclass(frozen=True)
class _Standardised:
    layers: tuple[str, ...]

    def __call__(self, model: nn.Module) -> nn.Module:
        for name in self.layers:
            layer = model.get_submodule(name)
            layer.add_module(_STANDARD, _Standard(layer))
            layer.register_forward_pre_hook(_standardise)
        return model


def _standardise(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.get_submodule(_STANDARD)(given[0]), *given[1:])


class _Standard(nn.Module):
    """(x − mean) ÷ deviation of each input channel of a layer: of the batch in training, else running."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.last = isinstance(layer, nn.Linear)  # a linear layer reads the last axis
        width: Any = layer.in_features if self.last else layer.in_channels
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-10)

    def forward(self, inputs: Tensor) -> Tensor:
        """The same shape."""
        channels = inputs.movedim(-1, 1) if self.last else inputs
        found: Tensor = self.norm(channels.flatten(2) if channels.ndim > 2 else channels).view_as(channels)
        return found.movedim(1, -1) if self.last else found
