"""Pre-training on the original domain, for those who have no weights: `fit` with checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from holdfast.averaging import WeightAverage
from holdfast.domains import Domain
from holdfast.errors import UserError, require
from holdfast.files import load_torch, save_every_seconds, save_torch
from holdfast.finetuning import FineTuning
from holdfast.guard import Stateful
from holdfast.models import Architecture, State, load_state, state_of
from holdfast.progress import Reporter
from holdfast.runtime import Runtime
from holdfast.seeding import derive, seeded
from holdfast.tasks import Loss, Task
from holdfast.training import Batch, Forward, evaluate, fit, minibatches, plain


@dataclass(frozen=True)
class Checkpoint:
    """Where a training keeps its state every 20 seconds (`HOLDFAST_SAVE_SECONDS`), the name of the run it belongs to,
    and whether to go on from it."""

    path: Path
    identity: str = ""
    resume: bool = False

    def load(self) -> dict[str, object] | None:
        """What is there to go on from. `UserError` for another run's."""
        if not (self.resume and self.path.exists()):
            return None
        saved = load_torch(self.path)
        require(
            isinstance(saved, dict) and saved.get("identity") == self.identity,
            f"{self.path} is the checkpoint of another run; choose another --out",
        )
        return dict(saved)


def train(
    model: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    loss: Loss,
    tuning: FineTuning,
    parameters: list[nn.Parameter],
    *,
    runtime: Runtime,
    seed: int,
    forward: Forward = plain,
    others: Mapping[str, Stateful] | None = None,
    checkpoint: Checkpoint | None = None,
    reporter: Reporter,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Train `model` in place with the tuning's optimiser and schedule on `batches(first)`: from batch `first` on.

    Resumed from a checkpoint, the result is the same as undisturbed. With `tuning.ema` it is the averaged weights.
    `others`: what else has a state; `after` is called
    after every step. `UserError` where the loss is no longer finite.
    """
    optimiser = tuning.build_optimiser(parameters)
    schedule = tuning.build_schedule(optimiser)
    kept: dict[str, Stateful] = {"optimiser": optimiser, **(others or {})}
    kept |= {"schedule": schedule} if schedule is not None else {}
    average = WeightAverage(model, tuning.ema) if tuning.ema else None
    kept |= {"average": average} if average is not None else {}
    saved = checkpoint.load() if checkpoint else None
    first = 0
    if saved is not None:
        load_state(model, saved["model"])  # type: ignore[arg-type]
        for name, part in kept.items():
            part.load_state_dict(saved[name])
        first = int(saved["step"])  # type: ignore[call-overload]
    last_saved = time.monotonic()
    with reporter.bar("pretrain", tuning.steps, first) as bar, seeded(seed, "pretrain"):

        def after_step(step: int, value: float) -> None:
            nonlocal last_saved
            after()
            if average is not None:
                average.update()
            bar.update(step, f"loss {value:.3f}")
            if checkpoint is not None and time.monotonic() - last_saved > save_every_seconds():
                states = {name: part.state_dict() for name, part in kept.items()}
                save_torch(
                    checkpoint.path, {"identity": checkpoint.identity, "step": step, "model": state_of(model), **states}
                )
                last_saved = time.monotonic()

        result = fit(
            model,
            batches(first),
            loss,
            optimiser,
            runtime=runtime,
            forward=forward,
            schedule=schedule,
            seed=derive(seed, "noise"),
            first_step=first,
            after_step=after_step,
        )
    if result.diverged_at:
        raise UserError(
            f"pre-training diverged at step {result.diverged_at}: the loss is not finite; lower pretrain.lr "
            f"(now {tuning.lr:g}) or add pretrain.warmup"
        )
    if average is not None:
        average.apply()


def pretrain(
    architecture: Architecture,
    domain: Domain,
    tuning: FineTuning,
    task: Task,
    runtime: Runtime,
    *,
    seed: int = 0,
    start: State | None = None,
    checkpoint: Checkpoint | None = None,
    reporter: Reporter | None = None,
) -> State:
    """Train on `domain.train`, from `start` where it is given, else from scratch, and return the weights."""
    reporter = reporter or Reporter(quiet=True)
    tuning = replace(tuning, initialise="keep" if start else "scratch", train="all")
    classes = len(domain.classes)
    seed = derive(seed, "pretrain")
    model = runtime.place(architecture.build(classes, seed))
    tuning.initialise_from(model, start or {}, architecture, classes, seed)
    train(
        model,
        lambda first: minibatches(domain.train, tuning.batch_size, tuning.steps, derive(seed, "data"), runtime, first),
        task.loss,
        tuning,
        tuning.choose_parameters(model, architecture, classes),
        runtime=runtime,
        seed=seed,
        forward=task.forward,
        checkpoint=checkpoint,
        reporter=reporter,
    )
    metric, loss = evaluate(model, domain.validation, task, runtime)
    reporter.say(
        f"pretrain: {task.scale.name} {task.scale.shown(metric)}, loss {loss:.3f} on validation data of {domain.name}"
    )
    return state_of(model)
