"""What all defences share: what they are given, and the way from an engine to `protect`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from holdfast.distributed import ALONE, Group, current
from holdfast.domains import Domain, ImageData
from holdfast.errors import require
from holdfast.features import Tap
from holdfast.finetuning import FineTuning
from holdfast.guard import Guard, Select, run_guarded
from holdfast.models import Architecture
from holdfast.runtime import Runtime
from holdfast.seeding import derive, seeded
from holdfast.snapshots import History, Phase, Stateful
from holdfast.tasks import Task
from holdfast.training import Batch, evaluate, minibatches
from holdfast.workplace import Workplace

SETTLING = 20  # original batches over which `Given.settle` takes running statistics


@dataclass(frozen=True)
class Given:
    """What a defence is given: the model with a head for `original`'s classes, on the runtime's device; the original
    domain; the defender's half of the restricted one, which has `classes` classes; the processes of the run."""

    model: nn.Module
    original: Domain
    restricted: ImageData
    classes: int
    architecture: Architecture
    task: Task
    runtime: Runtime
    seed: int = 0
    group: Group = ALONE

    def head(self) -> list[str]:
        """Names of the model's head; `UserError` where it does not fit the original classes."""
        return self.architecture.head(self.model, len(self.original.classes))

    def tap(self) -> Tap:
        """The features that stand for an image: what goes into the head, or what comes out of the layer that the model
        itself names by a method `feature_layer`."""
        own = getattr(self.model, "feature_layer", None)
        return Tap(self.model, own(), "output") if callable(own) else Tap(self.model, self.head()[0])

    def learner(self, classes: int | None = None) -> nn.Module:
        """A fresh model of the same architecture (default: for the restricted classes), on the device."""
        count = self.classes if classes is None else classes
        return self.runtime.place(self.architecture.build(count, derive(self.seed, "learner")))

    def batches(self, data: ImageData, size: int, stream: str, first: int, count: int = 1) -> Iterator[Batch]:
        """Batches `first` … `first + count − 1` (from 0) of an endless stream of `data`, of each this process's part;
        see `minibatches`."""
        seed = derive(self.seed, stream)
        return minibatches(data, size, first + count, seed, self.runtime, first_step=first, group=self.group)

    def settle(self, iteration: int, size: int) -> None:
        """Give batch normalisation the running statistics that the weights as they are now have on `SETTLING` batches
        of `size` original images (Wu and Johnson, 2021): while these move fast the running ones lag behind, the check
        finds the original lost that is not, and weakens what it need not."""
        if not size or not normalises_batches(self.model):
            return
        batches = self.batches(self.original.train, size, "settle", iteration * SETTLING, SETTLING)
        with seeded(self.seed, "settle", iteration), self.runtime.autocast():
            update_bn((images for images, _ in batches), self.model)

    def original_metric(self) -> float:
        """The original metric on validation data."""
        return evaluate(self.model, self.original.validation, self.task, self.runtime)[0]


@contextmanager
def own_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalisation takes the statistics of the batch that passes, and its running ones do not follow.

    Restricted images pass like this, alone: as in an attacker's own training step, which would undo whatever rests on
    the statistics of a mixture; and the running statistics stay those of original images.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    before = [m.track_running_stats for m in layers]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, tracks in zip(layers, before, strict=True):
            layer.track_running_stats = tracks


class Flag:
    """Something that has happened or has not, as a state that goes back with the model."""

    def __init__(self) -> None:
        self.up = False

    def state_dict(self) -> dict[str, bool]:
        """Whether it has."""
        return {"up": self.up}

    def load_state_dict(self, state_dict: Mapping[str, bool]) -> None:
        """Back to a state."""
        self.up = state_dict["up"]


class Engine(ABC):
    """The moving parts of one protection: `length` iterations; `states`: what goes back with the model after a breach;
    `restricted_metric`: what the curve shows, and the selection may look at, lower is better; `may_fail`: losses that
    are NaN in an iteration that had nothing to say, though the model is whole; `settling`: the size of the batches with
    which running statistics are taken anew before a check (`Given.settle`), 0 where they are left; `attempts`: how
    often all of it may be tried (`holdfast.guard.Guard`)."""

    length: int
    states: Mapping[str, Stateful]
    restricted_metric: Callable[[], float]
    may_fail: ClassVar[Collection[str]] = ()
    settling: int = 0
    attempts: int = 1

    @abstractmethod
    def iterate(self, iteration: int, strength: float) -> Mapping[str, float]:
        """Work on the model for one iteration (from 1), suppression weakened to `strength` in (0, 1]; losses by name.
        All randomness comes from `iteration`."""

    def phase(self, iteration: int) -> Phase:
        """See `holdfast.guard.Guard`."""
        return "candidate"

    def done(self, iteration: int) -> bool:
        """Whether nothing is left to do after this iteration, though `length` is not reached."""
        return False


class Guarded:
    """A defence that improves the model iteration by iteration, within a tolerance. Subclasses are frozen dataclasses
    that bring `engine`; `released` says which state within tolerance is kept."""

    tolerance: float
    check_every: int
    released: ClassVar[Select] = "last"
    measures: ClassVar[bool] = False  # whether `measure` finds anything
    compiles: ClassVar[bool] = False  # whether it runs on a compiled network: not where it looks inside
    spreads: ClassVar[bool] = False  # whether several processes share the work
    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}

    def engine(self, given: Given) -> Engine:
        """The moving parts, ready for iteration 1."""
        raise NotImplementedError

    def simulates(self, tuning: FineTuning, edits: Sequence[Any] = ()) -> bool:
        """Whether the defence trained against this strategy; most train against none."""
        return False

    def suits(self, task: Task) -> bool:
        """Whether the defence works with this task; most need labels, logits and a head."""
        return task.labelled

    def check_head(self, heads: Sequence[str]) -> None:
        """`UserError` where the defence cannot work with this head, or with a model that has none."""

    def check_classes(self, original: int, restricted: int) -> None:
        """`UserError` where the defence cannot work with these numbers of classes; most can with any."""

    def require_fit(self, given: Given) -> None:
        """`UserError` for a network, data or classes that the defence cannot work with."""
        require(
            self.compiles or not given.runtime.compile,
            f"{type(self).__name__} looks inside the network, which a compiled one does not allow; set "
            "runtime.compile: false",
        )
        require(
            self.spreads or current().count == 1,
            f"{type(self).__name__} works in one process, but "
            f"{current().count} were started; start it without torchrun (sophon spreads over several)",
        )
        require(
            self.suits(given.task),
            f"{type(self).__name__} as it is set needs labels; for the task {given.task.name} there are sophon, "
            "lockout, and ntp with regulariser mmd or none",
        )
        require(
            current().count == 1 or not given.runtime.checkpointing or not normalises_batches(given.model),
            "runtime.checkpointing recomputes what several processes' batch normalisation has found together, which "
            "torch does not allow; set it to false, start one process, or take a network without batch normalisation",
        )
        heads = given.head()
        self.check_head(heads)
        if heads:
            self.check_classes(len(given.original.classes), given.classes)
        for parameter in given.model.parameters():
            parameter.requires_grad_(True)

    def prepare(self, given: Given) -> Engine:
        """The engine; `UserError` for a network, data or classes that the defence cannot work with."""
        self.require_fit(given)
        return self.engine(given)

    def check(self, given: Given, build: bool = True) -> None:
        """Raise before any work what `protect` would raise; without `build`, nothing beside the model is built, and
        what only that would show is found later."""
        if build:
            self.prepare(given)
        else:
            self.require_fit(given)

    def measure(self, given: Given, restricted: ImageData) -> Mapping[str, float]:
        """What the defence's paper reports of a model beside its metric, by name, on test data of both domains."""
        return {}

    def protect(
        self,
        model: nn.Module,
        original: Domain,
        restricted: ImageData,
        *,
        restricted_classes: int,
        architecture: Architecture,
        task: Task,
        runtime: Runtime,
        seed: int = 0,
        identity: str = "",
        workplace: Workplace | None = None,
    ) -> History:
        """Protect `model` in place, and return what happened.

        `original`: training data keep, validation data check intactness. `restricted`: the defender's half.
        The model must have a head for `original`'s classes and lie on the runtime's device. Raises `UserError` for
        heads and classes that do not agree. The workplace's processes share adversaries and batches, or, where the
        runtime shares the model among them, every batch of all that is done.
        """
        workplace = workplace or Workplace()
        group = workplace.group if runtime.sharing.count == 1 else ALONE
        given = Given(model, original, restricted, restricted_classes, architecture, task, runtime, seed, group)
        engine = self.prepare(given)
        return run_guarded(
            model,
            engine.states,
            engine.iterate,
            iterations=engine.length,
            guard=Guard(self.tolerance, self.check_every, given.task.scale, engine.attempts),
            original=given.original_metric,
            restricted=engine.restricted_metric,
            identity=identity,
            workplace=workplace,
            phase=engine.phase,
            select=self.released,
            done=engine.done,
            settle=partial(given.settle, size=engine.settling),
            may_fail=engine.may_fail,
        )


def normalises_batches(model: nn.Module) -> bool:
    """Whether batch normalisation is part of it."""
    return any(isinstance(m, _BatchNorm) for m in model.modules())


def require_tolerance(spec: Guarded) -> None:
    """`UserError` for a tolerance outside [0, 1)."""
    require(0 <= spec.tolerance < 1, f"tolerance must lie in [0, 1), but got {spec.tolerance}")


def require_positive(spec: object, *names: str) -> None:
    """`UserError` for the first of these fields that is below 1."""
    for name in names:
        require(getattr(spec, name) >= 1, f"{name} must be at least 1, but got {getattr(spec, name)}")


def require_rates(spec: object, *names: str) -> None:
    """`UserError` for the first of these fields that does not lie in (0, 1]."""
    for name in names:
        require(0 < getattr(spec, name) <= 1, f"{name} must lie in (0, 1], but got {getattr(spec, name)}")
