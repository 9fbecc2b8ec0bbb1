"""Pre-training on the original domain, for those who have no weights: `fit` with checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from holdfast.augmentation import augmented
from holdfast.averaging import WeightAverage
from holdfast.checkpoints import Checkpoint, Clock
from holdfast.distributed import ALONE, Group
from holdfast.domains import Domain
from holdfast.errors import UserError
from holdfast.files import save_every_seconds
from holdfast.finetuning import FineTuning
from holdfast.models import Architecture, State, load_state, state_of
from holdfast.progress import Reporter
from holdfast.runtime import Runtime
from holdfast.seeding import derive, seeded
from holdfast.snapshots import Stateful
from holdfast.stopping import unfinished
from holdfast.tasks import Loss, Task
from holdfast.training import Batch, Forward, evaluate, fit, minibatches, plain


class _Kept:
    """A training's state: where it goes on from, and how it is saved every 20 seconds (`HOLDFAST_SAVE_SECONDS`)."""

    def __init__(self, checkpoint: Checkpoint | None, model: nn.Module, parts: Mapping[str, Stateful]) -> None:
        self.checkpoint, self.model, self.parts = checkpoint, model, parts
        self.clock = Clock(save_every_seconds())

    def resume(self, group: Group) -> int:
        """Put back what the first process saved; returns the steps that were done by then."""
        checkpoint = self.checkpoint
        found = group.agreed(lambda: checkpoint.load() if checkpoint else None)
        if found is None:
            return 0
        load_state(self.model, found["model"])
        for name, part in self.parts.items():
            part.load_state_dict(found[name])
        return int(found["step"])

    def save(self, step: int) -> None:
        """Everything, after `step` steps."""
        if self.checkpoint is not None:
            states = {name: part.state_dict() for name, part in self.parts.items()}
            self.checkpoint.save({"step": step, "model": state_of(self.model), **states})

    def save_if_due(self, step: int) -> None:
        """Every so many seconds."""
        if self.clock.due():
            self.clock.save(lambda: self.save(step))


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
    group: Group = ALONE,
) -> None:
    """Train `model` in place with the tuning's optimiser and schedule on `batches(first)`: from batch `first` on.

    Resumed from a checkpoint, the result is the same as undisturbed. With `tuning.ema` it is the averaged weights.
    `others`: what else has a state; `after` is called after every step. SIGTERM is obeyed after the step at hand.
    `group`: processes that share every batch; the first keeps the checkpoint.
    `UserError` where the loss is no longer finite.
    """
    optimiser = tuning.build_optimiser(parameters)
    schedule = tuning.build_schedule(optimiser)
    parts: dict[str, Stateful] = {"optimiser": optimiser, **(others or {})}
    parts |= {"schedule": schedule} if schedule is not None else {}
    average = WeightAverage(model, tuning.ema) if tuning.ema else None
    parts |= {"average": average} if average is not None else {}
    kept = _Kept(checkpoint if group.first else None, model, parts)
    first = kept.resume(group)
    bar_of = reporter.bar("pretrain", tuning.steps, first)
    with unfinished(group.any) as between_steps, bar_of as bar, seeded(seed, "pretrain"):

        def after_step(step: int, value: Tensor) -> None:
            after()
            if average is not None:
                average.update()
            bar.update(step, lambda: f"loss {value.item():.3f}")
            between_steps(lambda: kept.save(step))
            kept.save_if_due(step)

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
            group=group,
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
    group: Group = ALONE,
) -> State:
    """Train on `domain.train`, from `start` where it is given, else from scratch, and return the weights."""
    reporter = reporter or Reporter(quiet=True)
    tuning = replace(tuning, initialise="keep" if start else "scratch", train="all")
    classes = len(domain.classes)
    seed = derive(seed, "pretrain")
    model = runtime.place(architecture.build(classes, seed))
    tuning.initialise_from(model, start or {}, architecture, classes, seed)
    order = derive(seed, "data")

    def batches(first: int) -> Iterator[Batch]:
        plainly = minibatches(
            domain.train, tuning.batch_size, tuning.steps, order, runtime, first_step=first, group=group
        )
        return augmented(plainly, tuning.augment, tuning.mixup, classes, seed, first)

    train(
        model,
        batches,
        task.loss,
        tuning,
        tuning.choose_parameters(model, architecture, classes),
        runtime=runtime,
        seed=seed,
        forward=task.forward,
        checkpoint=checkpoint,
        reporter=reporter,
        group=group,
    )
    metric, loss = evaluate(model, domain.validation, task, runtime)
    reporter.say(
        f"pretrain: {task.scale.name} {task.scale.shown(metric)}, loss {loss:.3f} on validation data of {domain.name}"
    )
    return state_of(model)
