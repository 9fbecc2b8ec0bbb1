"""Pre-training on the original domain, for those who have no weights: `fit` with checkpoints."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from holdfast.domains import Domain
from holdfast.errors import UserError, require
from holdfast.files import load_torch, save_every_seconds, save_torch
from holdfast.finetuning import FineTuning
from holdfast.models import Architecture, State, load_state, state_of
from holdfast.progress import Reporter
from holdfast.runtime import Runtime
from holdfast.seeding import derive, seeded
from holdfast.tasks import Task
from holdfast.training import evaluate, fit, minibatches


def pretrain(
    architecture: Architecture,
    domain: Domain,
    tuning: FineTuning,
    task: Task,
    runtime: Runtime,
    *,
    seed: int = 0,
    start: State | None = None,
    checkpoint: Path | None = None,
    identity: str = "",
    resume: bool = False,
    reporter: Reporter | None = None,
) -> State:
    """Train on `domain.train` and return the weights.

    From `start` where it is given, else from scratch. With `checkpoint`, the state is kept there every 20 seconds
    (`HOLDFAST_SAVE_SECONDS`), and with `resume` the run goes on from it; the result is the same as undisturbed.
    """
    reporter = reporter or Reporter(quiet=True)
    tuning = replace(tuning, initialise="keep" if start else "scratch", train="all")
    classes = len(domain.classes)
    seed = derive(seed, "pretrain")
    model = runtime.place(architecture.build(classes, seed))
    tuning.initialise_from(model, start or {}, architecture, classes, seed)
    optimiser = tuning.build_optimiser(tuning.choose_parameters(model, architecture, classes))
    schedule = tuning.build_schedule(optimiser)
    first = 0
    if checkpoint is not None and checkpoint.exists() and resume:
        saved = load_torch(checkpoint)
        require(
            isinstance(saved, dict) and saved.get("identity") == identity,
            f"{checkpoint} is the checkpoint of another run; choose another --out",
        )
        load_state(model, saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        if schedule is not None:
            schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
    last_saved = time.monotonic()
    with reporter.bar("pretrain", tuning.steps, first) as bar, seeded(seed, "pretrain"):

        def after_step(step: int, loss: float) -> None:
            nonlocal last_saved
            bar.update(step, f"loss {loss:.3f}")
            if checkpoint is not None and time.monotonic() - last_saved > save_every_seconds():
                save_torch(
                    checkpoint,
                    {
                        "identity": identity,
                        "step": step,
                        "model": state_of(model),
                        "optimiser": optimiser.state_dict(),
                        "schedule": schedule.state_dict() if schedule else None,
                    },
                )
                last_saved = time.monotonic()

        result = fit(
            model,
            minibatches(domain.train, tuning.batch_size, tuning.steps, derive(seed, "data"), runtime, first),
            task.loss,
            optimiser,
            runtime=runtime,
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
    metric, loss = evaluate(model, domain.validation, task, runtime)
    reporter.say(f"pretrain: {task.metric} {metric:.3f}, loss {loss:.3f} on validation data of {domain.name}")
    return state_of(model)
