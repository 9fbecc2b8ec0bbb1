"""Batch normalisation wherever a network calls it, done otherwise: by the statistics of another batch, for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

BATCH_NORM = signature(F.batch_norm)


class OnBatchNorm(TorchFunctionMode):
    """Within it `normalise(arguments)` stands in for every `F.batch_norm` in training; `arguments` are that function's,
    by name, with its defaults."""

    def __init__(self, normalise: Callable[[dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self.normalise = normalise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`F.batch_norm` in training is `normalise`; everything else is itself."""
        if func is F.batch_norm:
            bound = BATCH_NORM.bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            if bound.arguments["training"]:
                return self.normalise(bound.arguments)
        return func(*args, **(kwargs or {}))


class Lent:
    """The statistics that a batch lends to another one.

    Within `lending()` a network in training normalises as ever, and what it finds is kept; within `borrowing()` the
    same network, on another batch, is normalised by that, and its running statistics stay. So the second batch is seen
    as in evaluation, up to what the running statistics lag behind, but the gradient knows that they will follow: with
    constants in their place it shifts both batches together, without end and to no purpose.
    """

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def lending(self) -> Iterator[None]:
        """Keep the statistics, call by call."""
        self.found.clear()

        def keep(given: dict[str, Any]) -> Tensor:
            values = given["input"].float()
            self.found.append(torch.var_mean(values, [0, *range(2, values.ndim)], correction=0))
            return F.batch_norm(**given)

        with OnBatchNorm(keep):
            yield

    @contextmanager
    def borrowing(self) -> Iterator[None]:
        """Take them, in the same order; `ValueError` where the network normalises more often than it lent."""
        left = iter(self.found)

        def take(given: dict[str, Any]) -> Tensor:
            statistics = next(left, None)
            if statistics is None:
                raise ValueError("the network normalises more often than it lent statistics")
            return _normalised(*statistics, given)

        with OnBatchNorm(take):
            yield


def _normalised(variance: Tensor, mean: Tensor, given: dict[str, Any]) -> Tensor:
    values, weight, bias = given["input"], given["weight"], given["bias"]
    weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    bias = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    x = values.float() if values.dtype is torch.float64 else values  # the kernel mixes a half with float32, no more
    found: Tensor = _ByOthers.apply(x, mean, variance, weight, bias, given["eps"])
    return found.to(values.dtype)


class _ByOthers(torch.autograd.Function):
    """y = w·s·(x − m) + b with s = (v + ε)^(−½), as torch's own kernel has it, and the gradients that this one keeps to
    itself: dm = −w·s·Σ dy and dv = −½·w·s²·Σ dy·s·(x − m)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        """The shape and type of `x`."""
        ctx.save_for_backward(x, mean, variance, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """One for each argument."""
        x, mean, variance, weight = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        # Given twice: a CPU takes the running statistics, CUDA for channels-last images those of the forward pass.
        parts = (gradient, x, weight, mean, variance, mean, scale, False, ctx.eps, [True, True, True])
        dx, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(*parts)
        return dx, -weight * scale * by_bias, -0.5 * weight * scale.square() * by_weight, by_weight, by_bias, None
