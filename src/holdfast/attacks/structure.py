"""Edits of a model's structure: folded normalisation, leaky activations, a probe on an earlier layer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from holdfast.attacks.chains import close, outputs
from holdfast.attacks.released import WEIGHTS_ONLY, Means, Released, Restructured, described
from holdfast.errors import UserError, require
from holdfast.features import RECTIFIERS
from holdfast.layers import WEIGHT_LAYERS, executed_layers
from holdfast.models import Architecture, State, load_state


class StructureEdit:
    """What edits of structure have in common."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    needs: ClassVar[str] = WEIGHTS_ONLY
    revives: ClassVar[bool] = False
    fresh: ClassVar[bool] = False
    carries: ClassVar[bool] = False

    def summary(self) -> str:
        """One line."""
        return described(self)


@dataclass(frozen=True)
class FoldBatchNorm(StructureEdit):
    """Fold every batch normalisation into the convolution before it; same function, and no statistics any more."""

    name: Literal["fold-batchnorm"] = "fold-batchnorm"

    def obstacle(self, released: Released) -> str | None:
        """Only where a plain batch normalisation follows a convolution."""
        return None if _folds(released) else "no batch normalisation right behind a convolution"

    def apply(self, released: Released, means: Means) -> Released:
        """W·γ/σ and β + (b − μ)·γ/σ into each convolution."""
        pairs = _folds(released)
        model = released.build(means.runtime).eval()
        state: State = dict(released.state)
        for conv_name, norm_name in pairs:
            conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
            fused = fuse_conv_bn_eval(conv, norm)  # type: ignore[type-var,arg-type]
            weight, bias = fused.weight, fused.bias
            state = {n: v for n, v in state.items() if not n.startswith(f"{norm_name}.")}
            state[f"{conv_name}.weight"], state[f"{conv_name}.bias"] = _copy(weight), _copy(bias)
        factory = Restructured(released.architecture, _WithoutNorms(tuple(pairs)))
        return Released(replace(released.architecture, factory=factory), state, released.classes)


def _copy(value: Any) -> Tensor:
    found: Tensor = value.detach().cpu().contiguous()
    return found


@dataclass(frozen=True)
class _WithoutNorms:
    pairs: tuple[tuple[str, str], ...]

    def __call__(self, model: nn.Module) -> nn.Module:
        for conv_name, norm_name in self.pairs:
            conv = model.get_submodule(conv_name)
            if isinstance(conv, nn.Conv2d) and conv.bias is None:
                conv.bias = nn.Parameter(torch.zeros(conv.out_channels))
            model.set_submodule(norm_name, nn.Identity())
        return model


def _folds(released: Released) -> list[tuple[str, str]]:
    """Pairs (convolution, batch normalisation of its very outputs). That nothing lies between is seen by trying: the
    two swapped for their fusion must give the same outputs, on noise and on zeros."""
    model = released.architecture.build(released.classes).eval()
    load_state(model, released.state)
    example = released.architecture.example(4)
    probes = (torch.randn(example.shape, generator=torch.Generator().manual_seed(0)), example)
    order = executed_layers(model, example[:1])
    found = []
    for first, second in itertools.pairwise(order):
        conv, norm = model.get_submodule(first), model.get_submodule(second)
        if isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d and norm.num_features == conv.out_channels:
            before = [outputs(model, p) for p in probes]
            model.set_submodule(first, fuse_conv_bn_eval(conv, norm))
            model.set_submodule(second, nn.Identity())
            same = all(close(outputs(model, p), b) for p, b in zip(probes, before, strict=True))
            model.set_submodule(first, conv)
            model.set_submodule(second, norm)
            found += [(first, second)] if same else []
    return found


@dataclass(frozen=True)
class LeakyActivations(StructureEdit):
    """Swap every ReLU for a leaky one, so that a dead unit has a gradient again."""

    slope: float = 0.1
    name: Literal["leaky"] = "leaky"
    carries: ClassVar[bool] = True
    revives: ClassVar[bool] = True
    fresh: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 < self.slope < 1, f"slope must lie in (0, 1), but got {self.slope}")

    def obstacle(self, released: Released) -> str | None:
        """Only for models with ReLU modules."""
        model = released.architecture.build(released.classes)
        return None if any(isinstance(m, RECTIFIERS) for m in model.modules()) else "the model has no ReLU modules"

    def apply(self, released: Released, means: Means) -> Released:
        """The same weights under other activations."""
        factory = Restructured(released.architecture, _Leaky(self.slope))
        return replace(released, architecture=replace(released.architecture, factory=factory))


@dataclass(frozen=True)
class _Leaky:
    slope: float

    def __call__(self, model: nn.Module) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, RECTIFIERS):
                model.set_submodule(name, nn.LeakyReLU(self.slope))
        return model


@dataclass(frozen=True)
class EarlierLayer(StructureEdit):
    """Cut the model before one of its last weight layers, and put a new linear head there."""

    k: int = 2  # features are the input of the k-th last weight layer; 1 is the usual head
    grid: int = 2  # maps are averaged to grid × grid
    name: Literal["earlier-layer"] = "earlier-layer"

    def __post_init__(self) -> None:
        require(self.k >= 1 and self.grid >= 1, f"k and grid must be at least 1, but got {self.k} and {self.grid}")

    def obstacle(self, released: Released) -> str | None:
        """Only for models with so many layers."""
        try:
            self.layer(released)
        except UserError as error:
            return str(error)
        return None

    def layer(self, released: Released) -> str:
        """The layer whose input is read. `UserError` where the model has too few."""
        model = released.architecture.build(released.classes)
        order = executed_layers(model, released.architecture.example())
        weights = [n for n in order if isinstance(model.get_submodule(n), WEIGHT_LAYERS)]
        require(self.k <= len(weights) - 1, f"the model has {len(weights)} weight layers, too few for k = {self.k}")
        return weights[-self.k]

    def apply(self, released: Released, means: Means) -> Released:
        """Body up to the cut with its weights; the head is a fresh one, to be re-initialised by the fine-tuning."""
        body = released.architecture
        factory = _ProbeFactory(body, released.classes, self.layer(released), self.grid)
        architecture = replace(body, factory=factory)
        fresh = architecture.build(released.classes).state_dict()
        state = {n: v for n, v in fresh.items() if n.startswith("head.")}
        return Released(
            architecture, {**state, **{f"body.{n}": v for n, v in released.state.items()}}, released.classes
        )


@dataclass(frozen=True)
class _ProbeFactory:
    base: Architecture
    body_classes: int
    layer: str
    grid: int

    def __call__(self, classes: int) -> nn.Module:
        return Probe(self.base.construct(self.body_classes), self.layer, self.grid, classes, self.base.example(2))


class _Reached(Exception):
    """Raised by a hook to leave a forward pass once the features are there."""


class Probe(nn.Module):
    """A body run up to the input of `layer`, whose features a linear head reads."""

    def __init__(self, body: nn.Module, layer: str, grid: int, classes: int, example: Tensor) -> None:
        super().__init__()
        self.body, self.layer, self.grid = body, layer, grid
        body.eval()
        with torch.no_grad():
            width = self.features(example).shape[1]
        self.train()
        self.head = nn.Linear(width, classes)

    def features(self, inputs: Tensor) -> Tensor:
        """(n, width): maps averaged to grid × grid, tokens over their number."""
        found: list[Tensor] = []

        def leave(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            found.append(given[0])
            raise _Reached

        hook = self.body.get_submodule(self.layer).register_forward_pre_hook(leave)
        try:
            self.body(inputs)
        except _Reached:
            pass
        finally:
            hook.remove()
        features = found[-1]
        if features.ndim == 4 and isinstance(self.body.get_submodule(self.layer), nn.Linear):
            features = features.movedim(-1, 1)  # a linear layer reads the last axis: maps with their channels last
        if features.ndim == 4:
            features = nn.functional.adaptive_avg_pool2d(features, min(self.grid, features.shape[-1]))
        elif features.ndim == 3:
            features = features.mean(1)
        return features.flatten(1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (n, classes)."""
        logits: Tensor = self.head(self.features(inputs))
        return logits
