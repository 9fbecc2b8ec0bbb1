"""One cell of an audit: one model under one attack with one seed. Cells are independent of each other and picklable."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from holdfast.attacks.attack import Attack
from holdfast.attacks.released import Means, Released
from holdfast.domains import ImageData, sample
from holdfast.finetuning import Note
from holdfast.flops import training_flops
from holdfast.metrics import evaluation_steps
from holdfast.models import Architecture, State, state_of
from holdfast.optimisers import passes
from holdfast.records import Record
from holdfast.runtime import Runtime
from holdfast.seeding import derive
from holdfast.tasks import Task
from holdfast.training import FitResult, evaluate

CONVERGED = 1e-3  # mean training loss below which a run is over: nothing is left to learn from


@dataclass(frozen=True)
class Ground:
    """A domain to fine-tune on: the adversary's images for each seed, and what its results are measured on."""

    train: tuple[ImageData, ...]
    validation: ImageData
    test: ImageData
    classes: int

    def to(self, runtime: Runtime) -> Ground:
        """All data on the runtime's device."""
        train = tuple(d.to(runtime) for d in self.train)
        return replace(self, train=train, validation=self.validation.to(runtime), test=self.test.to(runtime))


@dataclass(frozen=True)
class Bench:
    """All that the cells of one audit share. `original`: the little original data an attacker may have, for each seed.

    `steps`: the audit's budget; `evaluations`: points of a curve.
    """

    states: Mapping[str, State]
    architecture: Architecture
    head_classes: int
    restricted: Ground
    task: Task
    runtime: Runtime
    steps: int
    evaluations: int
    provenance: str
    original: tuple[ImageData, ...] = ()
    benign: Ground | None = None

    def to(self, runtime: Runtime) -> Bench:
        """All data on the runtime's device."""
        original = tuple(d.to(runtime) for d in self.original)
        benign = self.benign.to(runtime) if self.benign else None
        return replace(self, restricted=self.restricted.to(runtime), original=original, benign=benign)

    def suited(self, attack: Attack) -> Bench:
        """The same in float32, where an edit of the attack is lost on anything less."""
        if not any(getattr(e, "exact", False) for e in attack.edits):
            return self
        return replace(self, runtime=replace(self.runtime, precision="float32"))

    def curve(self, last: int) -> list[int]:
        """Steps after 0 at which a run of `last` steps is measured. A budget of 2ⁿ times the audit's has n points more,
        so that its earlier ones are those of the others."""
        more = max(0, round(math.log2(last / self.steps)))
        return evaluation_steps(last, self.evaluations + more)[1:]


@dataclass(frozen=True)
class CellSpec:
    """Which cell. `names`: the attacks under which its records are kept (a from-scratch run serves every attack with
    the same optimisation), `simulated` for each, and `settings`: what a search chose, None where nothing was searched
    (empty: for none of them). `benign`: on the third domain instead of the restricted one. `keep`:
    whether the model is wanted as it is at the end."""

    model: str
    attack: Attack
    names: tuple[str, ...]
    simulated: tuple[bool, ...]
    seed: int
    settings: tuple[dict[str, Any] | None, ...] = ()
    benign: bool = False
    keep: bool = False

    def named(self) -> list[tuple[str, bool, dict[str, Any] | None]]:
        """Each name, with whether the defence simulated it and what a search chose for it."""
        return list(zip(self.names, self.simulated, self.settings or (None,) * len(self.names), strict=True))


@dataclass(frozen=True)
class End:
    """A model at the end of an attack: its weights, and what builds it."""

    model: str
    state: State
    architecture: Architecture
    classes: int


@dataclass(frozen=True)
class Outcome:
    """What a cell has found; `end` where it was to be kept."""

    records: list[Record]
    end: End | None = None


@dataclass
class Prepared:
    """A model at the start of its fine-tuning: edited, with what it is trained on, and what that has cost. `images`:
    how many of the restricted domain the attacker has; edits may have added others."""

    released: Released
    train: ImageData
    images: int
    ground: Ground
    means: Means


def prepare(bench: Bench, model: str, attack: Attack, seed: int, benign: bool = False) -> Prepared:
    """Apply the attack's edits, and draw its share of the adversary's images."""
    ground = bench.benign if benign and bench.benign else bench.restricted
    train = fraction_of(ground.train[seed], attack.fraction, seed)
    own = derive(seed, "attack")
    means = Means(
        train,
        bench.task,
        bench.runtime,
        own,
        bench.steps,
        bench.original[seed] if bench.original else None,
        bench.benign.train[seed] if bench.benign else None,
    )
    if model in bench.states:
        released = Released(bench.architecture, bench.states[model], bench.head_classes)
    else:  # from scratch: a fresh model, with a head for what it is to learn
        fresh = bench.architecture.build(ground.classes, derive(own, "scratch"))
        released = Released(bench.architecture, state_of(fresh), ground.classes)
    for edit in attack.edits:
        released = edit.apply(released, means)
    return Prepared(released, means.restricted, len(train), ground, means)


def fraction_of(data: ImageData, fraction: float, seed: int) -> ImageData:
    """A share of the images, balanced; never fewer than one a class. Smaller shares lie within larger ones."""
    if fraction == 1:
        return data
    classes = len(torch.unique(data.labels))
    return sample(data, max(classes, round(fraction * len(data))), derive(seed, "fraction"))


@dataclass
class Meter:
    """What a run costs and whether gradients arrive: seen once, after its first step."""

    prepared: Prepared
    attack: Attack
    runtime: Runtime
    head: Sequence[str]
    per_step: float = 0.0
    dead: float = 0.0  # share of the trained weights before the head whose tensors get no gradient
    started: float = field(default_factory=time.monotonic)

    @property
    def batch(self) -> int:
        """Images in one step."""
        return min(self.attack.tuning.batch_size, len(self.prepared.train))

    def inspect(self, model: nn.Module) -> None:
        """Count the FLOPs of a step, and look for gradients behind the head."""
        example = self.prepared.train.batch(torch.arange(1), self.runtime)[0]
        self.per_step = self.batch * training_flops(model, example, passes(self.attack.tuning.optimiser))
        heads = tuple(f"{h}." for h in self.head)
        body = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith(heads)]
        lost = sum(p.numel() for p in body if p.grad is None or not p.grad.any())
        self.dead = lost / max(1, sum(p.numel() for p in body))

    def samples(self, step: int) -> int:
        """Images seen until `step`, those of the edits included."""
        return self.prepared.means.samples + step * self.batch

    def flops(self, step: int) -> float:
        """FLOPs until `step`, those of the edits included."""
        return self.prepared.means.flops + step * self.per_step

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return round(time.monotonic() - self.started, 3)


def start(bench: Bench, prepared: Prepared, seed: int) -> nn.Module:
    """A module of the (edited) architecture to train; `follow` gives it its weights."""
    built = prepared.released.architecture.build(prepared.ground.classes, derive(seed, "build"))
    return bench.runtime.place(built)


def run_cell(bench: Bench, spec: CellSpec) -> Outcome:
    """Edit, initialise, fine-tune, evaluate along the way on validation and test data. An attack that diverges keeps
    its broken model to the end: the steps it did not make are recorded as that model's, marked `diverged`."""
    began, bench = time.monotonic(), bench.suited(spec.attack)
    prepared = prepare(bench, spec.model, spec.attack, spec.seed, spec.benign)
    model = start(bench, prepared, spec.seed)
    architecture, ground, tuning = prepared.released.architecture, prepared.ground, spec.attack.tuning
    meter = Meter(prepared, spec.attack, bench.runtime, architecture.head(model, ground.classes), started=began)
    records: list[Record] = []

    def note(step: int, how: str) -> None:
        for split, data in (("validation", ground.validation), ("test", ground.test)):
            value, loss = evaluate(model, data, bench.task, bench.runtime)
            for name, simulated, setting in spec.named():
                records.append(
                    Record(
                        model=spec.model,
                        attack=name,
                        seed=spec.seed,
                        step=step,
                        last_step=tuning.steps,
                        split=split,
                        metric=bench.task.scale.metric,
                        value=value,
                        loss=loss if math.isfinite(loss) else None,
                        samples=meter.samples(step),
                        seconds=meter.seconds,
                        simulated=simulated,
                        # Finite in training mode, but not as a model is used: running statistics, the last update.
                        diverged=how == "diverged" or not math.isfinite(loss),
                        provenance=bench.provenance,
                        flops=meter.flops(step),
                        images=prepared.images,
                        setting=setting,
                        converged=how == "converged",
                        dead=meter.dead,
                    )
                )

    follow(bench, meter, model, spec.seed, note)
    end = End(spec.model, state_of(model), architecture, ground.classes) if spec.keep else None
    return Outcome(records, end)


def follow(bench: Bench, meter: Meter, model: nn.Module, seed: int, note: Note) -> FitResult:
    """The attack's fine-tuning of `model`, noted along the way. Paired by construction: all models of a seed see the
    same batches and the same new layers."""
    prepared, tuning = meter.prepared, meter.attack.tuning
    return tuning.run_from(
        prepared.released.state,
        model,
        prepared.train,
        bench.task,
        prepared.released.architecture,
        prepared.ground.classes,
        runtime=bench.runtime,
        seed=derive(seed, "attack"),
        steps=bench.curve(tuning.steps),
        note=note,
        inspect=meter.inspect,
        converged=CONVERGED,
    )
