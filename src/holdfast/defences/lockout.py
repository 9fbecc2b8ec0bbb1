"""Lockout, ours: what restricted images can make of a network is collapsed at every depth at which an attacker may
restart, and the units that read them are closed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from holdfast.augmentation import augmented, check_augmentation, shifted
from holdfast.collapse import between_images, hinge, log_spread_ratio, peak
from holdfast.defences.base import (
    Engine,
    Given,
    Guarded,
    normalises_batches,
    own_statistics,
    require_positive,
    require_rates,
    require_tolerance,
)
from holdfast.defences.places import Places, activations_of, examples, open_share
from holdfast.defences.probing import Prober
from holdfast.defences.reopening import Opened, Reopening
from holdfast.defences.sophon import Sophon
from holdfast.domains import ImageData
from holdfast.errors import require
from holdfast.features import Taps
from holdfast.finetuning import FineTuning, Initialise
from holdfast.guard import Select
from holdfast.models import load_state
from holdfast.normalisation import Lent
from holdfast.optimisers import adam
from holdfast.seeding import derive, generator, seeded
from holdfast.separation import class_mmd, fisher_ratio
from holdfast.snapshots import Phase
from holdfast.tasks import Task
from holdfast.training import Beside, fit

CLASSES = {"fisher": fisher_ratio, "mmd": class_mmd}  # the terms that make classes alike, not images
TERMS = ("spread", "peak", "reopen", *CLASSES, "answer")  # whose places are not activations


@dataclass(frozen=True)
class Lockout(Guarded):
    """Hyper-parameters of Lockout. There is no paper: every value is ours.

    The loss on a batch of each domain, with θ₀ the unprotected model and z_l, x_l what goes into activation l and
    weight layer l,

        L = L_task(original) + `distillation`·D(θ₀ ‖ θ; original) + s·( `hinge`·Σ_{l ∈ last close} H(z_l; restricted)
            + `flat`·Σ_{l ∈ last close} V(z_l; restricted)/V₀(z_l; original)
            + `spread`·Σ_l log r_l + `peak`·log Σ_l r_l + `fisher`·Σ_l F(x_l; restricted)
            + `mmd`·Σ_l M(x_l; restricted) + `reopen`·log Σ_{l behind k} r̃_l + `answer`·L_α(restricted) ) ,
        r_l = V(x_l; restricted)/V(x_l; original) ,

    each Σ a mean over its layers; r̃_l is r_l while what goes into activation k, another one in each step, spreads as
    original images do there (`collapse.reopened`); H is `collapse.hinge`, V `collapse.between_images`, F
    `separation.fisher_ratio`, M `separation.class_mmd`, L_α the task's suppression loss, s what the
    guard allows times `strength`. Restricted images pass with the batch statistics of the original ones
    (`normalisation.Lent`), as when the model is used or its layers are frozen, and with their own, as when it is
    trained: then they can be made alike, not closed.
    """

    close: int = 4  # activations, counted from the last, whose units are closed and made alike
    hinge: float = 1.0
    margin: float = 1.0  # in deviations of a channel's pre-activations on original images
    worst: float = 1.0  # of an image's most open unit, beside the mean over all
    flat: float = 3.0
    spread: float = 1.0
    peak: float = 0.0  # more of it where the original has room: shallow layers give way last
    spared: int = 0  # weight layers after the first whose inputs are left alone: edges serve every domain
    reopen: float = 0.0  # behind a place that is opened again, as an attacker's first steps open it
    fisher: float = 0.0
    mmd: float = 0.0
    answer: float = 0.0
    distillation: float = 2.0
    strength: float = 1.0  # the one number that chooses between more protection and more of the original
    iterations: int = 120
    steps: int = 20  # of Adam an iteration
    lr: float = 1e-3
    batch_size: int = 100  # of each domain
    augment: str = "none"  # of original images, as an adversary's: none, shift, shift+flip
    shift: bool = True  # restricted images are shifted by up to an eighth of their side
    repair: float = 0.4  # share of all iterations, the last, in which the rates fall to zero and states are candidates
    sophon: Sophon | None = None  # the second stage; its iterations come on top
    tolerance: float = 0.02
    attempts: int = 4  # weaker where those before ended outside of the tolerance, stronger where one used little of it
    check_every: int = 3
    probe_steps: int = 50
    released: ClassVar[Select] = "last"
    measures: ClassVar[bool] = True
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require_positive(self, "iterations", "steps", "attempts", "check_every", "probe_steps")
        require_rates(self, "lr")
        require(self.batch_size >= 2, f"batch_size must be at least 2, but got {self.batch_size}")
        for name in ("close", "spared"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, but got {getattr(self, name)}")
        require(0 < self.strength <= 10, f"strength must lie in (0, 10], but got {self.strength}")
        for name in ("hinge", "flat", *TERMS, "margin", "worst", "distillation"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, but got {getattr(self, name)}")
        terms = (*TERMS, *(("hinge", "flat") if self.close else ()))
        require(
            any(getattr(self, name) > 0 for name in terms), f"one of {', '.join(terms)} must be above 0, but all are 0"
        )
        require(
            self.sophon is None or self.sophon.update == "alternating",
            "sophon.update must be alternating within lockout: reinforcement is lockout's own loss there",
        )
        require(
            self.sophon is None
            or (self.sophon.repair, self.sophon.augment, self.sophon.reinforcement) == (0, "none", "task"),
            "sophon.repair, sophon.augment and sophon.reinforcement must be left alone within lockout: its own loss, "
            "augmentation and repair apply to both stages",
        )
        require(0 < self.repair <= 1, f"repair must lie in (0, 1], but got {self.repair}")
        check_augmentation(self.augment)
        require_tolerance(self)

    def simulates(self, tuning: FineTuning, edits: Sequence[Any] = ()) -> bool:
        """What the second stage simulates."""
        return self.sophon is not None and self.sophon.simulates(tuning, edits)

    def suits(self, task: Task) -> bool:
        """What makes classes alike needs labels."""
        return task.labelled or not self._compares_classes()

    def _compares_classes(self) -> bool:
        return any(getattr(self, name) for name in CLASSES)

    def check_head(self, heads: Sequence[str]) -> None:
        """As SOPHON, where it follows."""
        if self.sophon is not None:
            self.sophon.check_head(heads)

    def require_fit(self, given: Given) -> None:
        """As everywhere; and what recomputes a forward pass knows nothing of borrowed statistics or opened places; and
        where classes are compared there are images of each, or nothing would be done."""
        super().require_fit(given)
        require(
            not self._compares_classes() or len(given.restricted) >= 2 * given.classes,
            f"{' or '.join(CLASSES)} compare classes within a batch: the defender's half must have at least "
            f"{2 * given.classes} images, two of each restricted class, but has {len(given.restricted)}",
        )
        require(
            not given.runtime.checkpointing or not (self.reopen or normalises_batches(given.model)),
            "runtime.checkpointing recomputes forward passes without what lockout does in them (batch statistics that "
            "are borrowed, places that are opened); set it to false, or take a network without batch normalisation and "
            "reopen: 0",
        )

    def check_classes(self, original: int, restricted: int) -> None:
        """As SOPHON, where it follows; with `answer` one head serves both domains; classes are compared in a batch."""
        require(
            not self.answer or restricted <= original,
            f"head and classes do not agree: lockout with answer > 0 needs a head for the restricted classes too, but "
            f"there are {restricted} of them and {original} original ones",
        )
        require(
            not self._compares_classes() or self.batch_size >= 2 * restricted,
            f"batch_size must be at least {2 * restricted}, two images of each restricted class, with "
            f"{' or '.join(CLASSES)}, which compare classes within a batch; got {self.batch_size}",
        )
        if self.sophon is not None:
            self.sophon.check_classes(original, restricted)

    def engine(self, given: Given) -> _Engine:
        """The unprotected model as teacher, Adam, the places in the network."""
        return _Engine(self, given)

    def measure(self, given: Given, restricted: ImageData) -> Mapping[str, float]:
        """`leak`: the mean share of units behind the last activation that are open, on test images of both domains."""
        last = list(activations_of(given))[-1:]
        parts = {"restricted": restricted, "original": given.original.test}
        return {f"leak, {n}": open_share(given, d, a) for n, d in parts.items() for a in last}


class _Engine(Engine):
    """Both stages. An iteration whose simulated adversaries all diverged is one without suppression, as in SOPHON."""

    may_fail = ("fts",)

    def __init__(self, spec: Lockout, given: Given) -> None:
        self.spec, self.given, self.length, self.settling = spec, given, spec.iterations, spec.batch_size
        model = given.model
        self.simulation = spec.sophon.engine(given) if spec.sophon else None
        if spec.sophon:
            self.length += spec.sophon.iterations
        self.attempts = spec.attempts
        self.head = given.head()
        close = spec.close if spec.hinge or spec.flat else 0
        self.places = Places(given, close, spec.spared)
        found = len(self.places.closed)
        require(
            found == close,
            f"close is {spec.close}, but the network runs {found} activation modules that can be closed (what calls "
            f"torch.relu is not seen); set defence.close to {found}" + ("" if found else ", without hinge and flat"),
        )
        self.reopening = (
            Reopening(model, list(activations_of(given)), self.places.depths, examples(given)) if spec.reopen else None
        )
        self.teacher = given.learner(len(given.original.classes)).eval().requires_grad_(False)
        load_state(self.teacher, model.state_dict())
        self.adam = adam(model.parameters(), spec.lr)
        self.states = {"adam": self.adam, **({"fts": self.simulation.fts} if self.simulation else {})}
        self.normalises = normalises_batches(model)
        self.suppression = given.task.suppression(None)
        same = len(given.original.classes) == given.classes
        heads: tuple[Initialise, ...] = ("keep", "head") if same else ("head",)
        learner = self.simulation.simulator.learner if self.simulation else None  # SOPHON's is free while it is probed
        self.restricted_metric = Prober(
            given, spec.probe_steps, initialise=heads if self.head else ("keep",), learner=learner
        )

    def phase(self, iteration: int) -> Phase:
        """Until the rate has fallen to its half intactness is only recorded: it comes back as the rate falls, and no
        state before is worth releasing."""
        return "candidate" if self._rate(iteration) <= 0.5 or iteration == self.length else "free"

    def _repairing(self) -> int:
        return max(1, round(self.spec.repair * self.length))

    def _rate(self, iteration: int) -> float:
        into = iteration - 1 - (self.length - self._repairing())
        return 0.5 * (1 + math.cos(math.pi * into / self._repairing())) if into > 0 else 1.0

    def iterate(self, iteration: int, strength: float) -> Mapping[str, float]:
        """`steps` steps of Adam; in the second stage one of SOPHON's iterations, with such steps for reinforcement."""
        spec, simulation, rate = self.spec, self.simulation, self._rate(iteration)
        strength *= spec.strength
        if simulation is None or iteration <= spec.iterations:
            found = self._train((iteration - 1) * spec.steps, spec.steps, spec.lr * rate, iteration, strength)
        else:
            sophon, into = simulation.spec, iteration - spec.iterations
            suppressed = [simulation.suppress(into, loop, strength * rate) for loop in range(sophon.fts_loops)]
            first = spec.iterations * spec.steps + (into - 1) * sophon.ntr_loops
            rest = self._train(first, sophon.ntr_loops, sophon.beta * rate, iteration, strength)
            found = {"fts": sum(suppressed) / len(suppressed), **rest}
        return found

    def _train(self, first: int, steps: int, lr: float, iteration: int, strength: float) -> dict[str, float]:
        """Steps `first` … `first + steps − 1` of Adam, each on a batch of each domain."""
        spec, given, model = self.spec, self.given, self.given.model
        for group in self.adam.param_groups:
            group["lr"] = lr
        ours = given.batches(given.original.train, spec.batch_size, "original", first, steps)
        ours = augmented(ours, spec.augment, 0.0, len(given.original.classes), derive(given.seed, "ours"), first)
        theirs = given.batches(given.restricted, spec.batch_size, "restricted", first, steps)
        both = Beside(ours, theirs)
        seen: dict[str, Tensor] = {}
        lent = Lent()
        draws = generator(given.seed, "reopen", first)  # its own: the same in every process, whatever its part is

        def forward(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            with lent.lending(), self.reopening.watching(draws) if self.reopening else nullcontext() as opened:
                outputs, away = given.task.beside(model, self.teacher, images, labels)
            kept = given.task.loss(outputs, labels) + spec.distillation * away
            spreads = spec.spread or spec.peak or spec.reopen
            original = [between_images(v) for v in taps.values] if spreads else []
            others, classes = both.of(labels)
            if spec.shift:
                others = given.runtime.images(shifted(others, max(1, others.shape[-1] // 8), flip=False))
            found = self._restricted(taps, closed, lent, original, others, classes, opened)
            seen.update({"kept": kept.detach(), **{n: v.detach() for n, v in found.items()}})
            return kept + strength * torch.stack(list(found.values())).sum()

        with (
            Taps(model, self.places.depths) as taps,
            Taps(model, self.places.closed) as closed,
            seeded(given.seed, "lockout", iteration),
        ):
            result = fit(model, both, lambda outputs, _: outputs, self.adam, runtime=given.runtime, forward=forward)
        values = {n: v.item() for n, v in seen.items()}
        return {"lockout": math.nan if result.diverged_at else result.loss, **values}

    def _restricted(
        self,
        taps: Taps,
        closed: Taps,
        lent: Lent,
        original: list[Tensor],
        images: Tensor,
        labels: Tensor,
        opened: Opened | None,
    ) -> dict[str, Tensor]:
        """The weighted terms on one batch of restricted images, by name; those of weight 0 are not computed."""
        spec, given, model, places = self.spec, self.given, self.given.model, self.places
        found: dict[str, Tensor] = {}

        def add(name: str, weight: float, terms: Iterable[Tensor]) -> None:
            if weight and (values := list(terms)):
                term = weight * torch.stack(values).mean()
                found[name] = found[name] + term if name in found else term

        def outputs_by(statistics: AbstractContextManager[object]) -> Tensor:
            with own_statistics(model), statistics, given.runtime.autocast():
                return given.task.forward(model, images, labels)

        passes: list[Callable[[], AbstractContextManager[object]]] = [lent.borrowing]
        passes += [nullcontext] if self.normalises else []
        for i, statistics in enumerate(passes):
            outputs, share = outputs_by(statistics()), 1 / len(passes)
            if i == 0:
                parts = zip(closed.values, places.thresholds, places.units, strict=True)
                add("hinge", spec.hinge, (hinge(z, at, u, spec.margin, spec.worst) for z, at, u in parts))
                if spec.answer:
                    add("answer", spec.answer, [self.suppression(outputs, labels)])
            flat = zip(closed.values, places.scales, strict=True)
            add("flat", spec.flat * share, (between_images(z) / s for z, s in flat))
            if spec.spread or spec.peak:
                ratios = [log_spread_ratio(r, o) for r, o in zip(taps.values, original, strict=True)]
                add("spread", spec.spread * share, ratios)
                add("peak", spec.peak * share, [peak(ratios)])
            for name, measure in CLASSES.items():
                add(name, getattr(spec, name) * share, (measure(v, labels) for v in taps.values))
        if opened is not None:  # by either statistics, in turn: a third pass in the place of two
            chosen = passes[opened.turn % len(passes)]
            add("reopened", spec.reopen, [opened.peak(lambda: outputs_by(chosen()), taps, original)])
        return found
