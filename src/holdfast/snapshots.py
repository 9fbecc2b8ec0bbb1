"""What a guarded run goes back to, and what it resumes from: snapshots on the host, and its checkpoint."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from holdfast.checkpoints import Checkpoint
from holdfast.errors import UserError
from holdfast.models import State, load_state, parts_of_state
from holdfast.sharding import own, reshard_state

Phase = Literal["free", "guarded", "candidate"]
Measure = Callable[[], float]
Snapshot = dict[str, Any]


class Stateful(Protocol):
    """An optimiser, a module, or anything else whose state goes back with the model's."""

    def state_dict(self) -> Any:
        """All of it, as tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Back to it."""
        ...


@dataclass
class History:
    """What happened at every check, in order; goes into the bundle and the report."""

    checks: list[dict[str, float]] = field(default_factory=list)
    rollbacks: int = 0
    silent: int = 0  # iterations in which a loss that may fail was not finite
    seconds: float = 0.0  # without those of probes that decide nothing
    attempts: list[float] = field(default_factory=list)  # that ended outside: the strength of each
    released: int | None = None  # the iteration, with those done again, whose state was released; 0: the unprotected


@dataclass
class Progress:
    """How far a run is, and what it can go back to. `iteration` counts all that were done; `repeated` of them in
    attempts before this one: `tries`, the strength of each and how far the original metric had fallen at its end."""

    iteration: int
    strength: float
    best_score: float
    best_iteration: int
    baseline: float
    history: History
    good: Snapshot  # the last one within tolerance
    best: State  # what would be released now
    beginning: Snapshot | None = None  # from which another attempt starts, where there may be one
    ceiling: float = 1.0  # of `strength`, in this attempt
    repeated: int = 0
    tries: list[tuple[float, float]] = field(default_factory=list)

    @property
    def at(self) -> int:
        """The iteration as the defence counts it."""
        return self.iteration - self.repeated


COUNTED = ("iteration", "strength", "best_score", "best_iteration", "baseline", "ceiling", "repeated", "tries")


def snapshot(model: nn.Module, optimisers: Mapping[str, Stateful], phase: Phase) -> Snapshot:
    """Model and optimisers as they are, on the host."""
    return {
        "phase": phase,
        "model": parts_of_state(model),
        "optimisers": {n: _on_host(o.state_dict()) for n, o in optimisers.items()},
    }


def _on_host(value: Any) -> Any:
    """A copy whose tensors lie in the host's memory: a device has none to spare for two Adams' state once more."""
    if isinstance(value, Tensor):
        return own(value.detach()).cpu().clone()
    if isinstance(value, dict):
        return {k: _on_host(v) for k, v in value.items()}
    return [_on_host(v) for v in value] if isinstance(value, list) else copy.deepcopy(value)


def restore(model: nn.Module, optimisers: Mapping[str, Stateful], kept: Snapshot) -> None:
    """Back to it."""
    load_state(model, kept["model"])
    for name, optimiser in optimisers.items():
        optimiser.load_state_dict(copy.deepcopy(kept["optimisers"][name]))
        if isinstance(optimiser, torch.optim.Optimizer):
            reshard_state(optimiser)


def start(
    model: nn.Module,
    optimisers: Mapping[str, Stateful],
    original: Measure,
    restricted: Measure,
    saved: Mapping[str, Any] | None,
    phase: Phase,
    again: bool = False,
) -> Progress:
    """From what a checkpoint held where there is one to resume, else from the unprotected model, which `model` is in
    either case; `again`: whether it is kept, as what another attempt starts from."""
    beginning = snapshot(model, optimisers, phase) if again else None
    if saved is not None:
        restore(model, optimisers, saved["now"])
        history = History(saved["checks"], saved["rollbacks"], saved.get("silent", 0), saved["seconds"])
        counted = {n: saved[n] for n in COUNTED if n in saved}
        counted["tries"] = [(s, d) for s, d in counted.get("tries", [])]
        good, best = saved["good"], saved["best"]
        return Progress(**counted, history=history, good=good, best=best, beginning=beginning)
    baseline, score = original(), restricted()
    if not math.isfinite(baseline):
        raise UserError("the unprotected model's original metric is not a number; check its weights")
    first = {"iteration": 0.0, "original": baseline, "restricted": score, "strength": 1.0}
    good, best = beginning or snapshot(model, optimisers, phase), parts_of_state(model)
    return Progress(0, 1.0, score, 0, baseline, History([first]), good, best, beginning)


def save(
    checkpoint: Checkpoint | None, model: nn.Module, optimisers: Mapping[str, Stateful], progress: Progress
) -> None:
    """All of it into the checkpoint, where there is one."""
    if checkpoint is None:
        return
    history = progress.history
    checkpoint.save(
        {
            **{n: getattr(progress, n) for n in COUNTED},
            "checks": history.checks,
            "rollbacks": history.rollbacks,
            "silent": history.silent,
            "seconds": history.seconds,
            "now": snapshot(model, optimisers, "candidate"),
            "good": progress.good,
            "best": progress.best,
        }
    )
