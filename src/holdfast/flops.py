"""Floating-point operations of training, counted by torch while they run."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def training_flops(model: nn.Module, example: Tensor, passes: int = 1) -> float:
    """FLOPs (a multiply–add is two) of one forward and backward pass over `example` (1, …) with what `requires_grad`
    says now, times `passes`. Convolutions, matrix products and attention count; additions and activations do not.

    Works on a copy in evaluation mode: weights, gradients, batch statistics and generators stay as they are.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    trial = copy.deepcopy(model).eval()
    trained = [p for p in trial.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(bool(trained)):
            outputs = trial(example)
        if trained:
            torch.autograd.grad(outputs.float().sum(), trained, allow_unused=True)
    return float(counter.get_total_flops()) * passes
