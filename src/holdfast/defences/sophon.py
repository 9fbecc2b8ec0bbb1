"""SOPHON (Deng et al., IEEE S&P 2024): simulated fine-tuning, suppression, reinforcement. Algorithm 1, Eq. 1–14."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from holdfast.augmentation import augmented, check_augmentation
from holdfast.defences.adversaries import Adversaries
from holdfast.defences.base import Engine, Given, require_positive, require_rates, require_tolerance
from holdfast.defences.probing import Prober
from holdfast.errors import require, unknown
from holdfast.guard import Select
from holdfast.models import load_state
from holdfast.optimisers import OPTIMISERS, adam
from holdfast.seeding import derive, seeded
from holdfast.simulation import GAMMAS, Accumulator, Simulator, step_weights, thinned
from holdfast.snapshots import Phase
from holdfast.tasks import Loss, Task
from holdfast.training import Forward, fit

UPDATES = ("alternating", "joint")
REINFORCEMENTS = ("task", "distillation")


@dataclass(frozen=True)
class Sophon(Adversaries):
    """Hyper-parameters of SOPHON; the defaults are the paper's, named behind each.

    An iteration runs `fts_loops` loops of fine-tuning suppression (each: N simulated adversaries drawn from Φ, K inner
    steps each, one Adam step at α on the accumulated gradient) and `ntr_loops` steps of normal training reinforcement
    (Adam at β). Where the paper is silent the value of its published code is taken, and said so.

    `update: joint` is ours: one Adam at β, on the gradient of L_NTR + `weight` · L_FTS. With an Adam each, both losses
    push by the signs of what they want, and what they want against each other (a smaller answer everywhere, a larger
    one everywhere) is all that happens; in the sum it cancels, and what is left tells the domains apart.

    `repair` is ours: in the last share of the iterations the rates fall to zero along half a cosine, and only in the
    second half of it intactness is a constraint; before, it is recorded.

    `reinforcement: distillation` is ours: on original data the model learns what the unprotected one answers, not what
    is true. What no model can know is no noise in that gradient, and the unprotected model's faults are kept with it.

    `augment` is ours: a model that was pre-trained on augmented images forgets without them what it knows of such, and
    is worse on test images than on the training images that reinforcement shows it.

    `onset` is ours: in the first share of the iterations the adversaries' learning rates rise over three decades to
    those drawn. Against adversaries who undo in a few steps whatever little there is yet, nothing ever begins.
    """

    evaluate_every: int = (
        1  # s; paper: every step. Ours: every s-th only, from a step drawn for each adversary, s·γ each
    )
    gamma: str = "uniform"  # γ; paper: not stated; published code: uniform
    held_out_fraction: float = 0.2  # |T|/(|R|+|T|); paper: not stated; published code: 20 of 150, 0.13
    fts_loops: int = 1  # ℓ_FTS; paper: 1
    ntr_loops: int = 1  # ℓ_NTR; paper: 1
    iterations: int = 800  # Iter; paper: 800
    alpha: float = 3e-4  # α; paper: 3e-4
    beta: float = 5e-4  # β; paper: 5e-4
    update: str = "alternating"  # paper: FTS and NTR in turn, an Adam each (Algorithm 1); joint: ours
    reinforcement: str = "task"  # paper: the task's loss (Eq. 6); distillation: ours
    weight: float = 0.2  # joint: of the suppression gradient beside that of reinforcement; ours
    onset: float = 0.0  # share of the iterations, at the start; ours. 0: the rates are those drawn all along
    repair: float = 0.0  # share of the iterations, at the end; ours. 0: constant rates, constrained all along
    ntr_batch_size: int = 200  # paper: not stated
    augment: str = "none"  # of reinforcement's images, as in pre-training: none, shift, shift+flip; ours
    clip: float | None = 0.5  # L2 norm of the suppression gradient; paper: not stated; published code: 0.5
    tolerance: float = 0.03  # λ of Eq. 1 as a share of the original metric; paper: 99.6 → 96.2 … 97.8 %, 0.034 … 0.018
    check_every: int = 10  # iterations between checks of intactness; paper: not stated
    probe_steps: int = 50  # steps of the probing adversary that selects the released state; ours
    probe_optimiser: str = "adam"  # its optimiser; ours
    probe_lr: float = 1e-3  # its learning rate; ours
    released: ClassVar[Select] = "lowest"
    compiles: ClassVar[bool] = True
    spreads: ClassVar[bool] = True
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "fts_loops", "ntr_loops", "iterations")
        require_positive(self, "ntr_batch_size", "check_every", "probe_steps")
        require_rates(self, "alpha", "beta")
        require(0 < self.probe_lr <= 10, f"probe_lr must lie in (0, 10], but got {self.probe_lr}")
        require(
            1 <= self.evaluate_every <= self.inner_steps,
            f"evaluate_every must lie in 1 … inner_steps, {self.inner_steps}, but got {self.evaluate_every}",
        )
        for name, valid in (("update", UPDATES), ("reinforcement", REINFORCEMENTS), ("gamma", GAMMAS)):
            chosen = getattr(self, name)
            require(chosen in valid, f"{name} must be one of {', '.join(valid)}, but got '{chosen}'")
        require(self.weight > 0, f"weight must be positive, but got {self.weight}")
        for name in ("onset", "repair"):
            require(0 <= getattr(self, name) <= 1, f"{name} must lie in [0, 1], but got {getattr(self, name)}")
        check_augmentation(self.augment)
        if self.probe_optimiser not in OPTIMISERS:
            raise unknown("optimiser", self.probe_optimiser, OPTIMISERS)
        require(
            0 < self.held_out_fraction < 0.9, f"held_out_fraction must lie in (0, 0.9), got {self.held_out_fraction}"
        )
        require(self.clip is None or self.clip > 0, f"clip must be positive or null, but got {self.clip}")
        require_tolerance(self)

    def suits(self, task: Task) -> bool:
        """Any task has a loss and a suppression loss."""
        return True

    def engine(self, given: Given) -> _Engine:
        """Two Adams, a simulator, and the probe that selects."""
        return _Engine(self, given)


class _Engine(Engine):
    """The moving parts of one protection: two Adams on the same parameters (joint: one), simulator, measures.

    Where all adversaries of an iteration diverged it is reinforcement alone: one that fails learnt nothing, so there is
    nothing to suppress, and nothing of the model to take back.
    """

    may_fail = ("fts",)

    def __init__(self, spec: Sophon, given: Given) -> None:
        spec.check_adversaries(given)
        self.spec, self.given, self.model, self.seed = spec, given, given.model, given.seed
        self.length = spec.iterations
        self.repairing = round(spec.repair * spec.iterations)
        parameters = list(given.model.parameters())
        self.fts = adam(parameters, spec.alpha)
        self.ntr = adam(parameters, spec.beta)
        self.states = {"fts": self.fts, "ntr": self.ntr}
        self.pushes: list[Tensor] = []  # joint: the suppression gradient that reinforcement takes along
        if spec.update == "joint":
            self.states = {"ntr": self.ntr}
            self.ntr.register_step_pre_hook(self._push)
        learner = given.learner()
        self.simulator = Simulator(
            learner,
            given.architecture,
            given.classes,
            given.restricted,
            given.task,
            given.runtime,
            spec.held_out_fraction,
            len(given.original.classes),
        )
        self.suppression = given.task.suppression(spec.suppression)
        self.gammas = step_weights(spec.gamma, spec.inner_steps)
        self.restricted_metric = Prober(
            given,
            spec.probe_steps,
            max(spec.inner_batch_size),
            tuple(i for i in spec.inner_initialise if i != "last-k") or (("head",) if given.head() else ("keep",)),
            learner,
            spec.probe_optimiser,
            spec.probe_lr,
        )
        self.teacher: nn.Module | None = None
        if spec.reinforcement == "distillation":
            self.teacher = given.learner(len(given.original.classes)).eval().requires_grad_(False)
            load_state(self.teacher, given.model.state_dict())

    def phase(self, iteration: int) -> Phase:
        """Until half of the repair is done, where there is one, intactness is only recorded: a guard that weakens
        suppression while most of the repair is still to come gives away what the tolerance allows."""
        return "free" if self.repairing and iteration <= self.length - self.repairing / 2 else "candidate"

    def rate(self, iteration: int) -> float:
        """What the rates are multiplied with: 1, and in the repair ½·(1 + cos π·k/n), k = 0 … n − 1."""
        into = iteration - 1 - (self.length - self.repairing)
        return 0.5 * (1 + math.cos(math.pi * into / self.repairing)) if into > 0 else 1.0

    def onset(self, iteration: int) -> float:
        """What the adversaries' learning rates are multiplied with: 10^(−3·(1 − i/n)) in iteration i of the first n."""
        rising = round(self.spec.onset * self.length)
        return float(10 ** (-3 * max(0.0, 1 - iteration / rising))) if rising else 1.0

    def iterate(self, iteration: int, strength: float) -> Mapping[str, float]:
        """Lines 3–21 of Algorithm 1. `strength` scales α, or the weight (the guard lowers it after a breach)."""
        self.pushes = []
        suppressed = [self.suppress(iteration, loop, strength) for loop in range(self.spec.fts_loops)]
        return {"fts": sum(suppressed) / len(suppressed), "ntr": self.reinforce(iteration)}

    def suppress(self, iteration: int, loop: int, strength: float) -> float:
        """One FTS loop: N adversaries, one Adam step; returns L_FTS (Eq. 4), NaN where all adversaries diverged."""
        accumulator = Accumulator()
        losses: list[float] = []
        together = self.given.group
        for n in together.own(self.spec.adversaries):
            own = Accumulator()
            adversary = self.spec.draw(self.seed, iteration, loop, n)
            seed = derive(self.seed, "simulation", iteration, loop, n)
            loss = self.simulator.simulate(
                self.model.state_dict(),
                replace(adversary, lr=adversary.lr * self.onset(iteration)),
                thinned(self.gammas, self.spec.evaluate_every, seed),
                self.suppression,
                own,
                seed,
                self.spec.draw_edits(self.seed, iteration, loop, n),
            )
            broken = not (math.isfinite(loss) and own.finite())
            if not self.given.runtime.sharing.any(broken):  # one that diverged has nothing to say
                accumulator.merge(own)
                losses.append(loss)
        names = dict(self.simulator.learner.named_parameters())
        count, total = accumulator.gather(names, together, len(losses), sum(losses))
        if not count:
            return math.nan
        accumulator.scale(1 / count)
        accumulator.apply(self.model)
        if self.spec.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip)
        if self.spec.update == "joint":
            scale = self.spec.weight * strength / self.spec.fts_loops
            found = [torch.zeros_like(p) if p.grad is None else p.grad * scale for p in self.model.parameters()]
            self.pushes = [a + b for a, b in zip(self.pushes, found, strict=True)] if self.pushes else found
        else:
            for group in self.fts.param_groups:
                group["lr"] = self.spec.alpha * strength * self.rate(iteration)
            self.fts.step()
        self.model.zero_grad(set_to_none=True)
        return total / count

    def _push(self, *_: Any) -> None:
        """Add the suppression gradient to that of reinforcement, before Adam's step."""
        if not self.pushes:  # every adversary diverged
            return
        for parameter, push in zip(self.model.parameters(), self.pushes, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # in the parameter's memory format, as Adam wants it
            parameter.grad.add_(push)

    def reinforce(self, iteration: int) -> float:
        """ℓ_NTR steps of Adam on original training data (Eq. 6 and 7), or on the unprotected model's answers to it;
        returns the last loss."""
        given, count, teacher = self.given, self.spec.ntr_loops, self.teacher
        forward: Forward = given.task.forward
        loss: Loss = given.task.loss
        if teacher is not None:
            forward, loss = partial(_imitated, given.task, teacher), _as_it_is
        for group in self.ntr.param_groups:
            group["lr"] = self.spec.beta * self.rate(iteration)
        first, spec = (iteration - 1) * count, self.spec
        batches = given.batches(given.original.train, spec.ntr_batch_size, "reinforce", first, count)
        batches = augmented(batches, spec.augment, 0.0, len(given.original.classes), derive(self.seed, "ours"), first)
        with seeded(self.seed, "reinforce", iteration, *given.group.stream):
            return fit(
                self.model, batches, loss, self.ntr, runtime=given.runtime, forward=forward, group=given.group
            ).loss


def _imitated(task: Task, teacher: nn.Module, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The distance of `Task.beside`, as a forward pass of the training loop."""
    return task.beside(model, teacher, inputs, targets)[1]


def _as_it_is(loss: Tensor, _: Tensor) -> Tensor:
    """The loss that the forward pass has already made."""
    return loss
