"""Edits of weights alone: the model's structure stays, and nobody trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.attacks.chains import links
from holdfast.attacks.released import WEIGHTS_ONLY, Means, Released, described
from holdfast.errors import require
from holdfast.features import rectified
from holdfast.layers import WEIGHT_LAYERS
from holdfast.pruning import PRUNED, pruned
from holdfast.seeding import derive, generator


class _Weights:
    """What edits of weights have in common."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    needs: ClassVar[str] = WEIGHTS_ONLY
    revives: ClassVar[bool] = False
    fresh: ClassVar[bool] = False
    carries: ClassVar[bool] = False

    def obstacle(self, released: Released) -> str | None:
        """None: it applies to any model."""
        return None

    def summary(self) -> str:
        """One line."""
        return described(self)


@dataclass(frozen=True)
class Rebalance(_Weights):
    """Scale channels of consecutive layers against each other until all are as large as fresh ones; same function.

    Undoes a rescaling between layers, after which no single learning rate fits all weights. For a channel of a link
    A → B: s = √(r_B / r_A), where r is the root-mean-square weight of the channel (what B reads of it) ÷ that of a
    fresh layer; before a batch normalisation, which undoes any scale, s = 1 / r_A. A few sweeps settle it.
    """

    sweeps: int = 20
    name: Literal["rebalance"] = "rebalance"

    def apply(self, released: Released, means: Means) -> Released:
        """The same function from balanced weights."""
        model = released.build(means.runtime)
        fresh = means.runtime.place(released.architecture.build(released.classes, derive(means.seed, "balance")))
        found = [(link, link.sizes(fresh)) for link in links(model, means.images(16))]
        for _ in range(self.sweeps):
            for link, (fresh_first, fresh_second) in found:
                first, second = link.sizes(model)
                above, below = first / fresh_first.mean(), second / fresh_second.mean()
                factors = 1 / above if link.statistics else (below / above).sqrt()
                link.scale(model, torch.where(factors.isfinite() & (factors > 0), factors, 1.0))
        return released.having(model)


@dataclass(frozen=True)
class Clip(_Weights):
    """Clip every layer's singular values at a multiple of their mean."""

    ratio: float = 3.0
    name: Literal["clip"] = "clip"

    def __post_init__(self) -> None:
        require(self.ratio > 0, f"ratio must be positive, but got {self.ratio}")

    def apply(self, released: Released, means: Means) -> Released:
        """W = U·min(Σ, ratio · mean Σ)·Vᵀ for every weight, a convolution's as (outputs, the rest)."""

        def clipped(weight: Tensor, layer: str) -> Tensor:
            left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            result: Tensor = left * values.clamp(max=self.ratio * float(values.mean())) @ right
            return result.view_as(weight)

        return _every_weight(released, means, clipped)


@dataclass(frozen=True)
class Noise(_Weights):
    """Add Gaussian noise to every weight."""

    scale: float = 0.1  # of each layer's own standard deviation
    name: Literal["noise"] = "noise"
    carries: ClassVar[bool] = True
    revives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.scale > 0, f"scale must be positive, but got {self.scale}")

    def apply(self, released: Released, means: Means) -> Released:
        """W + scale · std(W) · N(0, 1)."""

        def noisy(weight: Tensor, layer: str) -> Tensor:
            noise = torch.randn(weight.shape, generator=generator(means.seed, "noise edit", layer))
            return weight + self.scale * weight.std() * noise.to(weight)

        return _every_weight(released, means, noisy)


@dataclass(frozen=True)
class Shuffle(_Weights):
    """Permute the entries of every parameter among themselves: scales stay, what was learned goes.

    A control as much as an attack. Weights of good sizes, or residual branches that pre-training has all but closed,
    train faster than fresh ones whatever they hold; a lead over scratch that survives this is no knowledge.
    """

    name: Literal["shuffle"] = "shuffle"

    @torch.no_grad()
    def apply(self, released: Released, means: Means) -> Released:
        """Each tensor's entries in a random order, the same one for every model of a seed; batch normalisation's
        running statistics start anew."""
        model = released.build(means.runtime)
        for name, parameter in model.named_parameters():
            order = torch.randperm(parameter.numel(), generator=generator(means.seed, "shuffle", name))
            flat = parameter.flatten()
            parameter.copy_(flat[order.to(flat.device)].view_as(parameter))
        for module in _normalisations(model):
            module.reset_running_stats()
        return released.having(model)


@dataclass(frozen=True)
class Regrow(_Weights):
    """Give pruned weights a fresh initial value, so that the mask of a pruning defence is gone."""

    least: float = PRUNED  # share of zeros below which nothing was pruned
    name: Literal["regrow"] = "regrow"

    def obstacle(self, released: Released) -> str | None:
        """Only for pruned weights."""
        share = pruned(released.state)
        return None if share >= self.least else f"no pruned weights ({share:.1%} are zero)"

    def apply(self, released: Released, means: Means) -> Released:
        """Where W = 0, a fresh model's weight."""
        fresh = released.architecture.build(released.classes, derive(means.seed, "regrow"))

        def regrown(weight: Tensor, layer: str) -> Tensor:
            new = fresh.get_submodule(layer).weight
            return torch.where(weight == 0, new.to(weight), weight) if isinstance(new, Tensor) else weight

        return _every_weight(released, means, regrown)


@dataclass(frozen=True)
class BatchNormStatistics(_Weights):
    """Estimate batch normalisation's running statistics anew on the attacker's images, or reset all of it."""

    how: Literal["estimate", "reset"] = "estimate"
    fresh: ClassVar[bool] = True  # good statistics from the first step on help anyone
    name: Literal["batchnorm"] = "batchnorm"
    carries: ClassVar[bool] = True
    revives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.how in ("estimate", "reset"), f"how must be estimate or reset, but got '{self.how}'")

    def obstacle(self, released: Released) -> str | None:
        """Only for models with batch normalisation."""
        model = released.architecture.build(released.classes)
        return None if _normalisations(model) else "the model has no batch normalisation"

    def forgets(self, model: nn.Module) -> set[str]:
        """Scales and shifts, where they are reset."""
        layers = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)] if self.how == "reset" else []
        return {f"{n}.{p}" for n in layers for p in ("weight", "bias")}

    @torch.no_grad()
    def apply(self, released: Released, means: Means) -> Released:
        """`estimate`: mean and variance over up to 256 images, weights kept. `reset`: γ = 1, β = 0, mean 0, variance
        1."""
        model = released.build(means.runtime).train()
        for module in _normalisations(model):
            if self.how == "reset":
                module.reset_parameters()
            else:
                module.reset_running_stats()
                module.momentum = None  # a plain mean over what comes
        if self.how == "estimate":
            model(means.images())
        return released.having(model)


def _normalisations(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


@dataclass(frozen=True)
class ShiftBiases(_Weights):
    """Raise the bias of every unit that is negative on nearly all of the attacker's images, so that a ReLU passes it.

    Against defences that push activations below zero on restricted data. Layer by layer, first to last.
    """

    live: float = 0.02  # a unit positive on less than this share of images × positions counts as dead
    name: Literal["shift-biases"] = "shift-biases"
    carries: ClassVar[bool] = True
    revives: ClassVar[bool] = True

    def obstacle(self, released: Released) -> str | None:
        """Only for models with layers that a ReLU module follows."""
        model = released.architecture.build(released.classes)
        found = rectified_layers(model, released.architecture.example(2))
        return None if found else "no layer with a bias feeds a ReLU module"

    @torch.no_grad()
    def apply(self, released: Released, means: Means) -> Released:
        """b ← b − median of the pre-activation, for dead units of layers whose outputs go straight into a ReLU."""
        model = released.build(means.runtime).eval()
        images = means.images(64)
        for name in rectified_layers(model, images[:1]):
            module = model.get_submodule(name)
            bias = module.bias
            if isinstance(bias, Tensor):
                units = _pre_activations(model, module, images)  # (units, images × positions)
                dead = (units > 0).float().mean(1) < self.live
                bias -= torch.where(dead, units.median(1).values.to(bias), torch.zeros_like(bias))
        return released.having(model)


def rectified_layers(model: nn.Module, inputs: Tensor) -> list[str]:
    """Layers with a bias whose output tensor itself is what a ReLU module gets: no addition between, no other layer."""
    feeders = dict.fromkeys(feeder for _, feeder in rectified(model, inputs) if feeder)
    modules = {name: model.get_submodule(name) for name in feeders}
    return [n for n, m in modules.items() if isinstance(m, (*WEIGHT_LAYERS, _BatchNorm)) and isinstance(m.bias, Tensor)]


def _pre_activations(model: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, found: outputs.append(found.clone()))  # a ReLU may be in place
    model(images)
    hook.remove()
    found = outputs[-1].float()
    return found.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)


def _every_weight(released: Released, means: Means, change: Callable[[Tensor, str], Tensor]) -> Released:
    """Apply `change(weight, layer)` to the weights of all linear layers and convolutions."""
    model = released.build(means.runtime)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, WEIGHT_LAYERS) and isinstance(module.weight, Tensor):
                module.weight.copy_(change(module.weight.float(), name))
    return released.having(model)
