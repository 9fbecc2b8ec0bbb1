"""Floating-point operations of training, counted by torch while they run."""

from __future__ import annotations

import copy
from collections.abc import Hashable

import torch
from torch import Tensor, nn

_COUNTED: dict[Hashable, float] = {}  # an audit trains hundreds of modules that are built alike


def training_flops(model: nn.Module, example: Tensor, passes: int = 1) -> float:
    """FLOPs (a multiply–add is two) of one forward and backward pass over `example` (1, …) with what `requires_grad`
    says now, times `passes`. Convolutions, matrix products and attention count; additions and activations do not.

    Works on a copy in evaluation mode: weights, gradients, batch statistics and generators stay as they are. Modules
    that are built alike are counted once.
    """
    key = _construction(model, example)
    if key not in _COUNTED:
        _COUNTED[key] = _count(model, example)
    return _COUNTED[key] * passes


def _construction(model: nn.Module, example: Tensor) -> Hashable:
    """What FLOPs depend on: types and plain settings of all modules, shapes, and what is trained."""
    modules = tuple(
        (name, type(module), tuple((k, v) for k, v in vars(module).items() if k != "training" and _plain(v)))
        for name, module in model.named_modules(remove_duplicate=False)
    )
    tensors = tuple((name, p.shape, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False))
    return modules, tensors, example.shape, example.dtype


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float) or (isinstance(value, tuple) and all(_plain(v) for v in value))


def _count(model: nn.Module, example: Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    trial = copy.deepcopy(model).eval()
    trained = [p for p in trial.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(bool(trained)):
            outputs = trial(example)
        if trained:
            torch.autograd.grad(outputs.float().sum(), trained, allow_unused=True)
    return float(counter.get_total_flops())
