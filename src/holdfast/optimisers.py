"""The optimisers an adversary may take: torch's own, and sharpness-aware minimisation, which torch lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.sharding import is_sharded

Parameters = Iterable[nn.Parameter]
Maker = Callable[[Parameters, float, float], torch.optim.Optimizer]


class SAM(torch.optim.SGD):
    """Sharpness-aware minimisation (Foret et al., ICLR 2021) over SGD with momentum 0.9.

    A step takes the gradient at w + ρ·g/‖g‖, where g is the gradient at w (Eq. 2 and 3 there), so it costs two
    backward passes. `step` needs a closure that computes the loss and its gradients anew; the gradients at w must be
    there already.
    """

    def __init__(self, parameters: Parameters, lr: float, weight_decay: float = 0.0, rho: float = 0.05) -> None:
        super().__init__(parameters, lr, momentum=0.9, weight_decay=weight_decay, foreach=True)
        self.rho = rho

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Climb to w + ρ·g/‖g‖, take the gradient there, come back, and step with it."""
        if closure is None:
            raise TypeError("SAM.step needs a closure that computes the gradients anew")
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before: list[Tensor] = [p.detach().clone() for p in moved]
        gradients = [p.grad for p in moved if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_add_(moved, torch._foreach_mul(gradients, self.rho / (norm + 1e-12)))
        with torch.enable_grad():
            closure()
        torch._foreach_copy_(moved, before)
        super().step()


def adam(parameters: Parameters, lr: float, weight_decay: float = 0.0, *, decoupled: bool = False) -> torch.optim.Adam:
    """Adam (Kingma and Ba, 2015) or, `decoupled`, AdamW, in one pass over the memory (`fused`): on a CPU a step on 11
    million parameters takes a quarter of what the same arithmetic operation by operation (`foreach`) takes.

    The fused CPU kernels read a gradient and the moments in the order in which they lie, whatever their strides say.
    So what comes in another memory format than its parameter's (a gradient written by hand, moments read from a
    file, which keeps none) is laid out like the parameter first. Parameters in shards (FSDP2) take `foreach`.
    """
    listed = list(parameters)
    fused = not any(is_sharded(p) for p in listed)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    made = kind(listed, lr, weight_decay=weight_decay, fused=fused, foreach=not fused)
    if fused:
        made.register_step_pre_hook(_align_gradients)
        made.register_load_state_dict_post_hook(_align_moments)
    return made


def _align_gradients(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)


def _align_moments(optimiser: torch.optim.Optimizer) -> None:
    for parameter, moments in optimiser.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter).copy_(value)


def keep_zeros(optimiser: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """After every step of `optimiser`, set to zero what is exactly zero now in weights of two dimensions or more
    (a pruning mask; a bias at zero is none)."""
    masks = [(p, p.detach() != 0) for p in parameters if p.ndim > 1]
    masks = [(p, kept) for p, kept in masks if not kept.all()]

    @torch.no_grad()
    def enforce(*_: Any) -> None:
        for parameter, kept in masks:
            parameter.mul_(kept)

    optimiser.register_step_post_hook(enforce)


def passes(optimiser: str) -> int:
    """Forward and backward passes that one step of an optimiser makes."""
    return 2 if optimiser == "sam" else 1


# Momentum is 0.9 as in the paper's attack. `foreach` spares small models most of the Python between kernels.
OPTIMISERS: Mapping[str, Maker] = MappingProxyType(
    {
        "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr, weight_decay=wd, foreach=True),
        "momentum": lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=wd, foreach=True),
        "nesterov": lambda p, lr, wd: torch.optim.SGD(
            p, lr, momentum=0.9, weight_decay=wd, nesterov=True, foreach=True
        ),
        "adagrad": lambda p, lr, wd: torch.optim.Adagrad(p, lr, weight_decay=wd, foreach=True),
        "adadelta": lambda p, lr, wd: torch.optim.Adadelta(p, lr, weight_decay=wd, foreach=True),
        "adam": adam,
        "adamw": lambda p, lr, wd: adam(p, lr, wd, decoupled=True),
        "sam": SAM,
    }
)
