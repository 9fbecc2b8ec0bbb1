"""The outer loop that every defence shares: intactness, best state, checkpoints, resume, progress, curves.

A defence brings one function that improves the model for one iteration; `run_guarded` does the rest.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from holdfast.checkpoints import Checkpoint, Clock
from holdfast.errors import UserError, require
from holdfast.models import State, load_state, parts_of_state
from holdfast.progress import Bar
from holdfast.scales import ACCURACY, Scale
from holdfast.sharding import own, reshard_state
from holdfast.stopping import unfinished
from holdfast.workplace import Workplace, Write, curves

Phase = Literal["free", "guarded", "candidate"]
Select = Literal["lowest", "last"]


class Stateful(Protocol):
    """An optimiser, a module, or anything else whose state goes back with the model's."""

    def state_dict(self) -> Any:
        """All of it, as tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Back to it."""
        ...


Iterate = Callable[[int, float], Mapping[str, float]]
Measure = Callable[[], float]


@dataclass(frozen=True)
class Guard:
    """Constraint on intactness, checked every `every` iterations on original *validation* data.

    The metric may fall by a share `tolerance` of what the unprotected model reaches (an error may rise by it). On a
    breach, or a NaN, model and optimisers go back to the last good state and suppression is weakened by `weaken`; each
    good check strengthens it again by `recover`, up to 1.

    A defence in stages says which `Phase` an iteration is in: `free` (intactness is only recorded: it is to be repaired
    later), `guarded` (kept, but the state is not yet what is to be released), or `candidate`. From one phase there is
    no way back into an earlier one, except from a NaN.
    """

    tolerance: float
    every: int
    scale: Scale = ACCURACY
    weaken: float = 0.5
    recover: float = 1.25
    weakest: float = 1e-3

    def __post_init__(self) -> None:
        require(0 <= self.tolerance < 1, f"tolerance must lie in [0, 1), but got {self.tolerance}")
        require(self.every >= 1, f"check_every must be at least 1, but got {self.every}")


@dataclass
class History:
    """What happened at every check, in order; goes into the bundle and the report."""

    checks: list[dict[str, float]] = field(default_factory=list)
    rollbacks: int = 0
    silent: int = 0  # iterations in which a loss that may fail was not finite
    seconds: float = 0.0  # without those of probes that decide nothing
    released: int | None = None  # the iteration whose state was released; 0: the unprotected model


class _Watch:
    """Seconds since it was made, without those of what is timed apart."""

    def __init__(self) -> None:
        self.started, self.without = time.monotonic(), 0.0

    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self.started - self.without

    def apart(self, measure: Measure) -> Measure:
        """`measure`, whose time does not count."""

        def timed() -> float:
            before = time.monotonic()
            value = measure()
            self.without += time.monotonic() - before
            return value

        return timed


@dataclass
class _Progress:
    iteration: int
    strength: float
    best_score: float
    best_iteration: int
    baseline: float
    history: History


def run_guarded(
    model: nn.Module,
    optimisers: Mapping[str, Stateful],
    iterate: Iterate,
    *,
    iterations: int,
    guard: Guard,
    original: Measure,
    restricted: Measure,
    identity: str,
    workplace: Workplace,
    phase: Callable[[int], Phase] = lambda _: "candidate",
    select: Select = "lowest",
    done: Callable[[int], bool] = lambda _: False,
    settle: Callable[[int], None] = lambda _: None,
    may_fail: Collection[str] = (),
) -> History:
    """Call `iterate(i, strength)` for i = 1 … `iterations`; leave in `model` the best state within tolerance.

    `original()` is the original metric on validation data, `restricted()` what a simulated adversary reaches. Of the
    candidates within tolerance the one with the `lowest` of it is released, or the `last`. The unprotected model is
    itself a candidate, so the result is never out of tolerance. `iterate` must draw its randomness from i alone: then a
    run resumed from any checkpoint is the run undisturbed. `done(i)` ends the run after iteration i. `settle(i)` makes
    the state after iteration i fit to be measured, where that is due; only what is measured is ever released.
    `identity` names the run in its checkpoint; a checkpoint of another run is refused.
    A loss that is not finite means a broken model, but for those that `may_fail`: there an iteration said nothing.
    """
    watch, group = _Watch(), workplace.group
    original, restricted = (_common(m, workplace) for m in (original, restricted))
    probe = watch.apart(restricted) if select == "last" else restricted
    checkpoint = workplace.checkpoint(identity)
    saved_state = workplace.load(checkpoint)
    state = _start(model, optimisers, original, probe, saved_state, phase(1))
    progress, good, best = state
    spent = progress.history.seconds
    floor = guard.scale.floor(progress.baseline, guard.tolerance)
    clock = Clock(workplace.save_every_seconds)
    bar_of = workplace.reporter.bar("protect", iterations, progress.iteration)
    with unfinished(group.any) as between_steps, bar_of as bar, curves(workplace) as write:
        last = progress.iteration == iterations or (progress.iteration > 0 and done(progress.iteration))
        while not last:
            i = progress.iteration + 1
            losses = dict(iterate(i, progress.strength))
            progress.iteration = i
            last = i == iterations or done(i)
            for name, value in losses.items():
                write(f"protect/{name}", value, i)
            failed = {name for name, v in losses.items() if not math.isfinite(v)}
            broken = not failed <= set(may_fail)
            progress.history.silent += bool(failed)
            if broken or i % guard.every == 0 or last:
                if not broken:
                    settle(i)
                measures = (original, probe, phase(i), select)
                good, best = _check(
                    model, optimisers, guard, floor, measures, losses, broken, progress, good, best, group.any
                )
                _tell(bar, write, progress.history.checks[-1], losses)
            bar.update(i)
            progress.history.seconds = spent + watch.seconds()
            save = partial(_save, checkpoint, model, optimisers, progress, good, best)
            between_steps(save)
            due = clock.due() or last
            if group.any(due) if workplace.sharded else due:
                clock.save(save)
    load_state(model, best)
    progress.history.released = progress.best_iteration
    return progress.history


def _common(measure: Measure, workplace: Workplace) -> Measure:
    """What the first process measures, for all; of a sharded model all measure, for it takes all to run it."""
    group = workplace.group
    if not workplace.sharded:
        return partial(group.agreed, measure)

    def together() -> float:
        value = measure()
        return group.agreed(lambda: value)

    return together


Good = dict[str, Any]


def _check(
    model: nn.Module,
    optimisers: Mapping[str, Stateful],
    guard: Guard,
    floor: float,
    measures: tuple[Measure, Measure, Phase, Select],
    losses: Mapping[str, float],
    broken: bool,
    progress: _Progress,
    good: Good,
    best: State,
    agreed: Callable[[bool], bool],
) -> tuple[Good, State]:
    """Measure; accept the state or go back. Returns the last good and the best state."""
    original, restricted, phase, select = measures
    broken = agreed(broken or not all(bool(own(v).isfinite().all()) for v in model.state_dict().values()))
    kept = math.nan if broken else original()
    breach = broken or (kept < floor and phase != "free")
    entry = {"iteration": float(progress.iteration), "original": kept, "strength": progress.strength, **losses}
    if breach:
        if broken or good["phase"] == phase:
            _restore(model, optimisers, good)
            progress.history.rollbacks += 1
            entry["rolled_back"] = 1.0
        progress.strength = max(guard.weakest, progress.strength * guard.weaken)
    else:
        score = math.inf if phase == "free" else restricted()
        entry["restricted"] = score
        good = _snapshot(model, optimisers, phase)
        progress.strength = min(1.0, progress.strength * guard.recover)
        if phase == "candidate" and (select == "last" or score < progress.best_score):
            progress.best_score, progress.best_iteration = score, progress.iteration
            best = parts_of_state(model)
    progress.history.checks.append({k: v for k, v in entry.items() if math.isfinite(v)})
    return good, best


def _snapshot(model: nn.Module, optimisers: Mapping[str, Stateful], phase: Phase) -> Good:
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


def _restore(model: nn.Module, optimisers: Mapping[str, Stateful], good: Good) -> None:
    load_state(model, good["model"])
    for name, optimiser in optimisers.items():
        optimiser.load_state_dict(copy.deepcopy(good["optimisers"][name]))
        if isinstance(optimiser, torch.optim.Optimizer):
            reshard_state(optimiser)


def _start(
    model: nn.Module,
    optimisers: Mapping[str, Stateful],
    original: Measure,
    restricted: Measure,
    saved: Mapping[str, Any] | None,
    phase: Phase,
) -> tuple[_Progress, Good, State]:
    """From what a checkpoint held where there is one to resume, else from the unprotected model."""
    if saved is not None:
        _restore(model, optimisers, saved["now"])
        history = History(saved["checks"], saved["rollbacks"], saved.get("silent", 0), saved["seconds"])
        fields = {k: saved[k] for k in ("iteration", "strength", "best_score", "best_iteration", "baseline")}
        return _Progress(**fields, history=history), saved["good"], saved["best"]
    baseline, score = original(), restricted()
    if not math.isfinite(baseline):
        raise UserError("the unprotected model's original metric is not a number; check its weights")
    first = {"iteration": 0.0, "original": baseline, "restricted": score, "strength": 1.0}
    return (
        _Progress(0, 1.0, score, 0, baseline, History([first])),
        _snapshot(model, optimisers, phase),
        parts_of_state(model),
    )


def _save(
    checkpoint: Checkpoint | None,
    model: nn.Module,
    optimisers: Mapping[str, Stateful],
    progress: _Progress,
    good: Good,
    best: State,
) -> None:
    if checkpoint is None:
        return
    history = progress.history
    checkpoint.save(
        {
            "iteration": progress.iteration,
            "strength": progress.strength,
            "best_score": progress.best_score,
            "best_iteration": progress.best_iteration,
            "baseline": progress.baseline,
            "checks": history.checks,
            "rollbacks": history.rollbacks,
            "silent": history.silent,
            "seconds": history.seconds,
            "now": _snapshot(model, optimisers, "candidate"),
            "good": good,
            "best": best,
        }
    )


def _tell(bar: Bar, write: Write, check: Mapping[str, float], losses: Mapping[str, float]) -> None:
    """The progress line and the curves after a check."""
    step = int(check["iteration"])
    for name, value in check.items():
        if name != "iteration" and name not in losses:  # those are written at every iteration
            write(f"protect/{name}", value, step)
    parts = [f"{name} {value:.3f}" for name, value in losses.items()]
    parts += [f"original {check['original']:.3f}"] if "original" in check else []
    parts += [f"restricted {check['restricted']:.3f}"] if "restricted" in check else []
    parts += ["rolled back"] if "rolled_back" in check else []
    bar.update(step, " · ".join(parts))
