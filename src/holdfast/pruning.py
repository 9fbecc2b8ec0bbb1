"""Sparsity: projections, masks, and the alternating direction method of multipliers (ADMM; Boyd et al., 2011)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import require
from holdfast.layers import WEIGHT_LAYERS

Tensors = dict[str, Tensor]
BUDGETS = ("global", "layer")
PRUNED = 0.01  # share of exact zeros from which weights count as pruned


def prunable(model: nn.Module, keep: tuple[str, ...] = ()) -> list[str]:
    """Names of the weights of linear layers and convolutions, torch's attention among them (query, key and value are
    one linear layer there); those of the layers in `keep` are left out."""
    layers = [(n, m) for n, m in model.named_modules() if n not in keep]
    linear = [f"{n}.weight" if n else "weight" for n, m in layers if isinstance(m, WEIGHT_LAYERS)]
    attention = [
        f"{n}.in_proj_weight" if n else "in_proj_weight"
        for n, m in layers
        if isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None
    ]
    return linear + attention


def sparsity(weights: Mapping[str, Tensor]) -> float:
    """The share of exact zeros, over all tensors together."""
    total = sum(w.numel() for w in weights.values())
    return sum(int((w == 0).sum()) for w in weights.values()) / max(1, total)


def pruned(state: Mapping[str, Tensor]) -> float:
    """The share of exact zeros in a state's weights: floating tensors of two dimensions or more."""
    return sparsity({n: v for n, v in state.items() if v.is_floating_point() and v.ndim > 1})


def soft_threshold(values: Mapping[str, Tensor], threshold: float) -> Tensors:
    """The proximal map of λ‖·‖₁ at penalty ρ, threshold = λ/ρ: sign(v)·max(|v| − threshold, 0)."""
    return {n: v.sign() * (v.abs() - threshold).clamp(min=0) for n, v in values.items()}


def keep_largest(values: Mapping[str, Tensor], share: float, budget: str = "global") -> Tensors:
    """The Euclidean projection onto tensors of which a share `share` in [0, 1) is zero: the smallest magnitudes go.

    `budget`: `global`, over all tensors together, or `layer`, in each of them. At least one entry a tensor is kept, so
    that no layer is cut off.
    """
    require(0 <= share < 1, f"a sparsity must lie in [0, 1), but got {share}")
    require(budget in BUDGETS, f"budget must be one of {', '.join(BUDGETS)}, but got '{budget}'")
    if budget == "global":
        limit = _limit(torch.cat([v.abs().flatten() for v in values.values()]), share)
    found = {}
    for name, value in values.items():
        size = value.abs()
        least = limit if budget == "global" else _limit(size.flatten(), share)
        found[name] = torch.where(size >= torch.minimum(least, size.max()), value, torch.zeros_like(value))
    return found


def _limit(sizes: Tensor, share: float) -> Tensor:
    """The smallest magnitude that is kept."""
    gone = min(len(sizes) - 1, math.floor(share * len(sizes)))
    return sizes.sort().values[gone]


class ADMM:
    """W = Z with Z sparse, by its augmented Lagrangian in scaled form:

        W ← argmin f(W) + ρ/2·‖W − Z + U‖² ,  Z ← project(W + U) ,  U ← U + W − Z .

    `penalty` is the first step's second term, `update` the other two. (NTP's published code does not square the norm;
    the method does.)
    """

    def __init__(self, weights: Mapping[str, Tensor], rho: float) -> None:
        self.rho = rho
        self.z: Tensors = {n: w.detach().clone() for n, w in weights.items()}
        self.u: Tensors = {n: torch.zeros_like(w) for n, w in self.z.items()}

    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor:
        """ρ/2·Σ ‖W − Z + U‖², with gradient in W."""
        terms = [(w - self.z[n] + self.u[n]).square().sum() for n, w in weights.items()]
        return self.rho / 2 * torch.stack(terms).sum()

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], project: Any) -> tuple[float, float]:
        """Projection and dual update; returns the relative primal residual ‖W − Z‖/max(‖W‖, ‖Z‖) and the relative dual
        residual ‖Z − Z_before‖/‖U‖ (Boyd et al., §3.3; 0 where U is 0)."""
        before = self.z
        self.z = project({n: w + self.u[n] for n, w in weights.items()})
        for name, weight in weights.items():
            self.u[name] = self.u[name] + weight - self.z[name]
        gap = norm({n: w - self.z[n] for n, w in weights.items()})
        size = max(norm(weights), norm(self.z))
        moved, dual = norm({n: z - before[n] for n, z in self.z.items()}), norm(self.u)
        return gap / size if size else 0.0, moved / dual if dual else 0.0

    def strengthen(self, rho: float) -> None:
        """Another penalty from now on. The multipliers ρ·U stay, so U is scaled by ρ_before/ρ (Boyd et al., §3.4.1)."""
        self.u = {n: u * (self.rho / rho) for n, u in self.u.items()}
        self.rho = rho

    def state_dict(self) -> dict[str, Any]:
        """Z, U and ρ."""
        return {"z": dict(self.z), "u": dict(self.u), "rho": self.rho}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Back to a state; tensors go where the present ones are."""
        self.rho = state_dict["rho"]
        for own, saved in ((self.z, state_dict["z"]), (self.u, state_dict["u"])):
            for name, value in saved.items():
                own[name] = value.to(own[name].device).clone()


class Mask:
    """Which weights are left: none fixed yet, or one boolean tensor a weight."""

    def __init__(self) -> None:
        self.kept: Tensors = {}
        self.since = 0  # the iteration that fixed it

    def fix(self, values: Mapping[str, Tensor], iteration: int) -> None:
        """From now on, where `values` is not zero."""
        self.kept, self.since = {n: v != 0 for n, v in values.items()}, iteration

    @torch.no_grad()
    def enforce(self, weights: Mapping[str, Tensor]) -> None:
        """Zero what is masked, in place."""
        for name, kept in self.kept.items():
            weights[name].mul_(kept.to(weights[name].device))

    def state_dict(self) -> dict[str, Any]:
        """The mask and its age."""
        return {"kept": dict(self.kept), "since": self.since}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Back to a state."""
        self.kept, self.since = dict(state_dict["kept"]), state_dict["since"]


def norm(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm over all tensors together."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
