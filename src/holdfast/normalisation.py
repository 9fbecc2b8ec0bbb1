"""Batch normalisation wherever a network calls it, done otherwise: by the statistics of another batch, for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
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
    values: Tensor = given["input"]
    shape = [1, -1, *[1] * (values.ndim - 2)]
    scale = (variance + given["eps"]).rsqrt()
    if given["weight"] is not None:
        scale = scale * given["weight"]
    shift = -mean * scale if given["bias"] is None else given["bias"] - mean * scale
    found: Tensor = values.float() * scale.view(shape) + shift.view(shape)
    return found.to(values.dtype)
