"""The outer loop that every defence shares: intactness, best state, checkpoints, resume, progress, curves.

A defence brings one function that improves the model for one iteration; `run_guarded` does the rest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from holdfast.attempts import another
from holdfast.checkpoints import Clock
from holdfast.errors import require
from holdfast.models import load_state, parts_of_state
from holdfast.progress import Bar
from holdfast.scales import ACCURACY, Scale
from holdfast.sharding import own
from holdfast.snapshots import History, Measure, Phase, Progress, Stateful, restore, save, snapshot, start
from holdfast.stopping import unfinished
from holdfast.workplace import Workplace, Write, curves

Select = Literal["lowest", "last"]
Iterate = Callable[[int, float], Mapping[str, float]]


@dataclass(frozen=True)
class Guard:
    """Constraint on intactness, checked every `every` iterations on original *validation* data.

    The metric may fall by a share `tolerance` of what the unprotected model reaches (an error may rise by it). On a
    breach, or a NaN, model and optimisers go back to the last good state and suppression is weakened by `weaken`; each
    good check strengthens it again by `recover`, up to 1.

    A defence in stages says which `Phase` an iteration is in: `free` (intactness is only recorded: it is to be repaired
    later), `guarded` (kept, but the state is not yet what is to be released), or `candidate`. From one phase there is
    no way back into an earlier one, except from a NaN.

    A defence whose original metric comes back only at its end may have several `attempts`: where the end has no state
    within tolerance all is done again, from the beginning, weaker by what the breach says; where it then uses little of
    the tolerance, again, and stronger (`holdfast.attempts`). In all but the last of them, and where one before was
    within, only a way back weakens it. From the beginning, for what full strength has once taken from the original
    domain does not come back.
    """

    tolerance: float
    every: int
    scale: Scale = ACCURACY
    attempts: int = 1
    weaken: float = 0.5
    recover: float = 1.25
    weakest: float = 1e-3

    def __post_init__(self) -> None:
        require(0 <= self.tolerance < 1, f"tolerance must lie in [0, 1), but got {self.tolerance}")
        require(self.every >= 1, f"check_every must be at least 1, but got {self.every}")


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
    run resumed from any checkpoint is the run undisturbed. `done(i)` ends the run, or this attempt at it, after
    iteration i. `settle(i)` makes the state after iteration i fit to be measured, where that is due; only what is
    measured is ever released.
    `identity` names the run in its checkpoint; a checkpoint of another run is refused.
    A loss that is not finite means a broken model, but for those that `may_fail`: there an iteration said nothing.
    """
    watch, group = _Watch(), workplace.group
    original, restricted = (_common(m, workplace) for m in (original, restricted))
    probe = watch.apart(restricted) if select == "last" else restricted
    checkpoint = workplace.checkpoint(identity)
    progress = start(model, optimisers, original, probe, workplace.load(checkpoint), phase(1), guard.attempts > 1)
    run = _Run(model, optimisers, guard, original, probe, phase, select, settle, workplace, progress)
    spent = progress.history.seconds
    clock = Clock(workplace.save_every_seconds)
    bar_of = workplace.reporter.bar("protect", iterations + progress.repeated, progress.iteration)
    with unfinished(group.any) as between_steps, bar_of as bar, curves(workplace) as write:
        last = progress.at == iterations or (progress.at > 0 and done(progress.at))
        while not last:
            progress.iteration += 1
            i = progress.at
            losses = dict(iterate(i, progress.strength))
            last = i == iterations or done(i)
            for name, value in losses.items():
                write(f"protect/{name}", value, progress.iteration)
            check = run.judge(i, losses, may_fail, last)
            last = last and not run.again(bar)
            if check:
                _tell(bar, write, guard.scale, check, losses)
            bar.update(progress.iteration)
            progress.history.seconds = spent + watch.seconds()
            keep = partial(save, checkpoint, model, optimisers, progress)
            between_steps(keep)
            due = clock.due() or last
            if group.any(due) if workplace.sharded else due:
                clock.save(keep)
    return run.release()


def _common(measure: Measure, workplace: Workplace) -> Measure:
    """What the first process measures, for all; of a sharded model all measure, for it takes all to run it."""
    group = workplace.group
    if not workplace.sharded:
        return partial(group.agreed, measure)

    def together() -> float:
        value = measure()
        return group.agreed(lambda: value)

    return together


@dataclass
class _Run:
    """Which states are kept: what is measured, accepted, taken back, done again, released."""

    model: nn.Module
    optimisers: Mapping[str, Stateful]
    guard: Guard
    original: Measure
    restricted: Measure
    phase: Callable[[int], Phase]
    select: Select
    settle: Callable[[int], None]
    workplace: Workplace
    progress: Progress

    def judge(
        self, i: int, losses: Mapping[str, float], may_fail: Collection[str], last: bool
    ) -> dict[str, float] | None:
        """The check after iteration i, where one is due: every so often, at the end, where it broke."""
        guard, progress = self.guard, self.progress
        failed = {name for name, v in losses.items() if not math.isfinite(v)}
        broken = not failed <= set(may_fail)
        progress.history.silent += bool(failed)
        if not (broken or i % guard.every == 0 or last):
            return None
        if not broken:
            self.settle(i)
        return self._check(self.phase(i), losses, broken)

    def _check(self, phase: Phase, losses: Mapping[str, float], broken: bool) -> dict[str, float]:
        """Measure; accept the state or go back."""
        guard, progress, model = self.guard, self.progress, self.model
        finite = all(bool(own(v).isfinite().all()) for v in model.state_dict().values())
        broken = self.workplace.group.any(broken or not finite)
        kept = math.nan if broken else self.original()
        breach = broken or (kept < guard.scale.floor(progress.baseline, guard.tolerance) and phase != "free")
        entry = {"iteration": float(progress.iteration), "original": kept, "strength": progress.strength, **losses}
        if breach:
            back = broken or progress.good["phase"] == phase
            if back:
                restore(model, self.optimisers, progress.good)
                progress.history.rollbacks += 1
                entry["rolled_back"] = 1.0
            if back or not (self._attempts_left() or progress.best_iteration):
                progress.strength = max(guard.weakest, progress.strength * guard.weaken)
        else:
            score = math.inf if phase == "free" else self.restricted()
            entry["restricted"] = score
            progress.good = snapshot(model, self.optimisers, phase)
            progress.strength = min(progress.ceiling, progress.strength * guard.recover)
            if phase == "candidate" and (self.select == "last" or score < progress.best_score):
                progress.best_score, progress.best_iteration = score, progress.iteration
                progress.best = parts_of_state(model)
        check = {k: v for k, v in entry.items() if math.isfinite(v)}
        progress.history.checks.append(check)
        return check

    def _attempts_left(self) -> bool:
        return self.progress.beginning is not None and len(self.progress.tries) + 1 < self.guard.attempts

    def again(self, bar: Bar) -> bool:
        """After the last check: whether all is to be done again; then everything is back at the beginning, and
        weaker, or stronger."""
        guard, progress, check = self.guard, self.progress, self.progress.history.checks[-1]
        fall = progress.baseline - check.get("original", math.nan)
        outside = not fall <= self._allowed()
        if progress.beginning is None or (outside and self._found_one()):
            return False
        left = self._attempts_left()
        # What ended within after it was weakened on the way, or broke, says nothing of the strength that it began with.
        progress.tries.append((progress.ceiling if fall > self._allowed() else check["strength"], fall))
        strength = another(progress.tries, self._allowed(), guard.weakest) if left else None
        if strength is None:
            return False
        progress.strength = progress.ceiling = strength
        restore(self.model, self.optimisers, progress.beginning)
        progress.good = progress.beginning
        if outside and "rolled_back" not in check:  # as one that broke has been already
            progress.history.rollbacks += 1
            check["rolled_back"] = 1.0
        bar.extend(progress.at)
        progress.repeated = progress.iteration
        self._tell_why(check, outside)
        return True

    def _allowed(self) -> float:
        """How far the original metric may fall."""
        baseline = self.progress.baseline
        return baseline - self.guard.scale.floor(baseline, self.guard.tolerance)

    def _found_one(self) -> bool:
        """Whether this attempt has had a state within tolerance."""
        return self.progress.best_iteration > self.progress.repeated

    def _tell_why(self, check: Mapping[str, float], outside: bool) -> None:
        found = f"{self.guard.scale.shown(check.get('original'))} on the original domain at the end"
        found += ", outside of the tolerance" if outside else ", well within the tolerance"
        self.workplace.reporter.say(
            f"protect: {found if 'original' in check else 'the model broke'}; from the beginning again, with "
            f"restricted terms at {self.progress.strength:.2g}"
        )

    def release(self) -> History:
        """Leave the best state in the model."""
        progress = self.progress
        load_state(self.model, progress.best)
        progress.history.released = progress.best_iteration
        progress.history.attempts = [strength for strength, fall in progress.tries if not fall <= self._allowed()]
        return progress.history


def _tell(bar: Bar, write: Write, scale: Scale, check: Mapping[str, float], losses: Mapping[str, float]) -> None:
    """The progress line and the curves after a check."""
    step = int(check["iteration"])
    for name, value in check.items():
        if name != "iteration" and name not in losses:  # those are written at every iteration
            write(f"protect/{name}", value, step)
    parts = [f"{name} {value:.3f}" for name, value in losses.items()]
    parts += [f"{n} {scale.shown(check[n])}" for n in ("original", "restricted") if n in check]
    parts += ["rolled back"] if "rolled_back" in check else []
    bar.update(step, " · ".join(parts))
