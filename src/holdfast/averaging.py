"""Averaged weights: what diffusion models are released as, and what an attacker may release too."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.models import load_state
from holdfast.training import AfterStep


class WeightAverage:
    """Exponential moving average of a model's parameters and buffers: w̄ ← d·w̄ + (1 − d)·w after every step.

    d = min(`decay`, (1 + n)/(10 + n)) at step n, so that the first steps do not weigh for ever (as in diffusers'
    `EMAModel`). Integers (counters) are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.steps = model, decay, 0
        self.mean = {n: v.detach().clone() for n, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's weights in."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        now = self.model.state_dict()
        floats = [n for n, v in self.mean.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.mean[n] for n in floats], [now[n] for n in floats], 1 - decay)
        for name in self.mean.keys() - set(floats):
            self.mean[name].copy_(now[name])

    def apply(self) -> None:
        """Give the model the averaged weights."""
        load_state(self.model, self.mean)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights, for a while."""
        own = {n: v.detach().clone() for n, v in self.model.state_dict().items()}
        self.apply()
        try:
            yield
        finally:
            load_state(self.model, own)

    def following(self, after_step: AfterStep | None, shown: Collection[int]) -> AfterStep:
        """`after_step` with the average kept up to date; at the steps `shown` it sees the averaged weights."""

        def follow(step: int, loss: Tensor) -> bool | None:
            self.update()
            if after_step is None:
                return None
            if step not in shown:
                return after_step(step, loss)
            with self.applied():
                return after_step(step, loss)

        return follow

    def state_dict(self) -> dict[str, Any]:
        """The average and how many steps it has seen."""
        return {"steps": self.steps, "mean": {n: v.clone() for n, v in self.mean.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Back to a state."""
        self.steps = int(state_dict["steps"])
        saved: Mapping[str, Tensor] = state_dict["mean"]
        for name, value in self.mean.items():
            value.copy_(saved[name])
