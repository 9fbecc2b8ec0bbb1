"""Simulated fine-tuning: the gradient of the suppression loss along an adversary's path, in memory constant in K.

SOPHON, Algorithm 1, lines 5–13, first-order (§4.1.2). With ϑ⁰ = θ and ϑᵏ the adversary's weights after k of its own
updates on batches of R, the gradient of L_FTS = Σ_k γ_k·L_α(ϑᵏ; T) is approximated by

    g = Σ_k γ_k · ∂L_α(ϑᵏ; T) / ∂ϑᵏ ,

each term evaluated at the adapted weights and applied to θ. So one backward after each inner step, added to one
accumulator, is all: no graph outlives its step, and the adversary's optimiser may be any of torch's. (An unroll that
keeps its K graphs gives the same g, except that weight decay inside the inner optimiser scales it by (1 − lr·wd)^K,
which is an artefact: the derivative ∂ϑᵏ/∂θ is taken to be the identity.)

A parameter that the adversary re-initialised does not depend on θ at all: its term is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from holdfast.adapters import without_adapters
from holdfast.attacks.released import Edit, Means, Released, forgotten
from holdfast.distributed import Group
from holdfast.domains import ImageData, holdout
from holdfast.errors import require
from holdfast.finetuning import FineTuning
from holdfast.models import Architecture, State
from holdfast.runtime import Runtime
from holdfast.seeding import derive, generator, seeded
from holdfast.sharding import own
from holdfast.tasks import Loss, Task
from holdfast.training import Batch, fit, minibatches

GAMMAS = ("uniform", "linear", "last")


def step_weights(kind: str, steps: int) -> list[float]:
    """γ_1 … γ_K, which sum to 1: `uniform` (1/K), `linear` (∝ k), `last` (only the K-th). Equation 4 leaves γ open."""
    require(kind in GAMMAS, f"gamma must be one of {', '.join(GAMMAS)}, but got '{kind}'")
    if kind == "uniform":
        return [1 / steps] * steps
    if kind == "last":
        return [0.0] * (steps - 1) + [1.0]
    return [2 * k / (steps * (steps + 1)) for k in range(1, steps + 1)]


def thinned(gammas: Sequence[float], every: int, seed: int) -> list[float]:
    """Every `every`-th of γ_1 … γ_K, from one that `seed` draws evenly among the first `every`, each `every` times as
    large: Σ over these steps has the expectation of Σ over all, and costs a share of it."""
    first = int(torch.randint(every, (), generator=generator(seed, "thinned")))
    return [every * g if k % every == first else 0.0 for k, g in enumerate(gammas)]


@dataclass
class Accumulator:
    """Σ of gradients by parameter name, in float32."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, names: Sequence[str], gradients: Sequence[Tensor | None], scale: float) -> None:
        """Add `scale`·gradient for each name; None counts as zero."""
        pairs = [(n, g) for n, g in zip(names, gradients, strict=True) if g is not None]
        if not pairs:
            return
        for name, gradient in pairs:
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(gradient)
        torch._foreach_add_([self.sums[n] for n, _ in pairs], [g for _, g in pairs], alpha=scale)

    def merge(self, other: Accumulator) -> None:
        """Add another's sums."""
        self.add(list(other.sums), list(other.sums.values()), 1.0)

    def scale(self, factor: float) -> None:
        """Multiply all sums."""
        for value in self.sums.values():
            value.mul_(factor)

    def gather(self, parameters: Mapping[str, Tensor], group: Group, count: int, total: float) -> tuple[int, float]:
        """Add up the sums of all processes, by one all-reduce, and two numbers beside them; `parameters` has the shape
        of every name that there may be. A name that no process has stays absent."""
        if group.count == 1:
            return count, total
        device = next(iter(parameters.values())).device
        present = torch.tensor([float(n in self.sums) for n in parameters], device=device)
        beside = torch.tensor([float(count), total], device=device)
        for name, like in parameters.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(like)
        group.sum([*(self.sums[n] for n in parameters), present, beside])
        self.sums = {n: self.sums[n] for n, found in zip(parameters, present.tolist(), strict=True) if found}
        return int(beside[0].item()), beside[1].item()

    def finite(self) -> bool:
        """Whether every entry that this process has is finite."""
        found = [own(s).isfinite().all() for s in self.sums.values()]
        return not found or bool(torch.stack(found).all())

    def apply(self, model: nn.Module) -> None:
        """Make the sums the gradients of `model`'s parameters of the same name and shape; the others get none."""
        for name, parameter in model.named_parameters():
            found = self.sums.get(name)
            parameter.grad = None if found is None or found.shape != parameter.shape else found.to(parameter.dtype)


def accumulate_along_path(
    learner: nn.Module,
    tuning: FineTuning,
    parameters: list[nn.Parameter],
    adapt: Iterator[Batch],
    held_out: Iterator[Batch],
    gammas: Sequence[float],
    *,
    task: Task,
    suppression: Loss,
    accumulator: Accumulator,
    names: Mapping[str, str],
    runtime: Runtime,
    seed: int | None = None,
) -> float:
    """Fine-tune `learner` in place with `fit`; after inner step k add γ_k·∂L_α/∂ϑᵏ for `names`, the learner's, each
    under the name that it maps to.

    The suppression loss sees batch statistics, like the adversary's own step: with running statistics a defence
    could win by making them stale, and lose to anyone who re-estimates them. (An adversary who trains the head alone
    keeps the body in evaluation mode, and the loss sees what it sees.) Returns the γ-weighted suppression loss;
    NaN where the adversary diverged.
    """
    by_name = dict(learner.named_parameters())
    targets, theirs = [by_name[n] for n in names], list(names.values())
    total = torch.zeros((), device=runtime.device)

    def after_step(step: int, _: Tensor) -> None:
        inputs, labels = next(held_out)
        gamma = gammas[step - 1]
        if gamma == 0:
            return
        if runtime.sharing.count > 1:
            total.add_(_of_shards(learner, inputs, labels, gamma, task, suppression, accumulator, names, runtime))
            return
        found = Accumulator()

        def part(inputs: Tensor, labels: Tensor, share: float) -> Tensor:
            with runtime.autocast():
                outputs = task.forward(learner, inputs, labels)
            value = suppression(outputs, labels)
            if targets:  # none where the adversary re-initialised all there is
                gradients = torch.autograd.grad(value, targets, allow_unused=True)
                (accumulator if share == 1 else found).add(theirs, gradients, gamma * share)
            return value.detach() * share

        total.add_(runtime.micro.run(inputs, labels, part, found.sums.clear), alpha=gamma)
        accumulator.merge(found)

    result = fit(
        learner,
        adapt,
        task.loss,
        tuning.build_optimiser(parameters),
        runtime=runtime,
        forward=task.forward,
        set_mode=tuning.set_mode,
        seed=seed,
        after_step=after_step,
    )
    return math.nan if result.diverged_at else total.item()


def _of_shards(
    learner: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    gamma: float,
    task: Task,
    suppression: Loss,
    accumulator: Accumulator,
    names: Mapping[str, str],
    runtime: Runtime,
) -> Tensor:
    """γ·∂L_α/∂ϑᵏ of a learner in shards, each process with its part of the held-out batch; returns γ·L_α.

    Shards get their gradients by a backward pass through the whole learner only: the rest of it is thrown away.
    """
    mine = float(len(labels))
    learner.zero_grad(set_to_none=True)
    with runtime.autocast(), runtime.sharing.statistics():
        outputs = task.forward(learner, inputs, labels)
    value = suppression(outputs, labels)
    (value * mine).backward()  # type: ignore[no-untyped-call]
    both = torch.stack([value.detach() * mine, torch.full_like(value, mine)])
    runtime.sharing.sum([both])
    by_name = dict(learner.named_parameters())
    accumulator.add(list(names.values()), [by_name[n].grad for n in names], gamma / both[1].item())
    learner.zero_grad(set_to_none=True)
    return gamma * both[0] / both[1]


@dataclass(frozen=True)
class Simulator:
    """Runs simulated adversaries on the defender's half of the restricted domain.

    `learner` is a model of the same architecture with a head for the restricted classes. It is overwritten by every
    simulation, so the protected model itself, its batch statistics and its modes are never touched. Adversaries who
    change the structure get learners of their own. `released`: outputs of the protected model's head, which only
    edits need; None for as many as `classes`.
    """

    learner: nn.Module
    architecture: Architecture
    classes: int
    data: ImageData
    task: Task
    runtime: Runtime
    held_out_fraction: float = 0.2
    released: int | None = None
    _edited: dict[tuple[Edit, ...], nn.Module] = field(default_factory=dict, compare=False)

    def simulate(
        self,
        state: State,
        tuning: FineTuning,
        gammas: Sequence[float],
        suppression: Loss,
        accumulator: Accumulator,
        seed: int,
        edits: Sequence[Edit] = (),
    ) -> float:
        """One adversary: draw disjoint R and T, edit and initialise from `state` (θ), run K = `tuning.steps` steps and
        add g to `accumulator`. Returns the γ-weighted suppression loss, NaN where the adversary diverged."""
        adapt, evaluate = holdout(self.data.labels, self.held_out_fraction, generator(seed, "holdout"))
        start = Released(self.architecture, state, self.classes if self.released is None else self.released)
        for edit in edits:
            means = Means(self.data.subset(adapt), self.task, self.runtime, derive(seed, "edit"), tuning.steps)
            start = edit.apply(start, means)
        learner = self._learner(start.architecture, tuning, tuple(edits))
        fresh = tuning.initialise_from(learner, start.state, start.architecture, self.classes, derive(seed, "init"))
        fresh |= forgotten(edits, learner)
        with seeded(seed, "adapters"):
            trained = tuning.choose_parameters(learner, start.architecture, self.classes)
        for parameter in learner.parameters():
            parameter.requires_grad_(True)  # weights that the adversary freezes have a suppression gradient too
        # By the names that the protected model has.
        found = {n: without_adapters(n) for n, _ in learner.named_parameters()}
        names = {n: plain for n, plain in found.items() if plain is not None and plain not in fresh}
        held_size = round(tuning.batch_size * self.held_out_fraction / (1 - self.held_out_fraction))
        held_size = max(2, held_size)  # batch statistics of one sample are none
        steps = tuning.steps
        batches = partial(minibatches, self.data, steps=steps, runtime=self.runtime)
        needed = [gamma != 0 for gamma in gammas]
        with seeded(seed, "simulation"):
            return accumulate_along_path(
                learner,
                tuning,
                trained,
                batches(batch_size=tuning.batch_size, seed=derive(seed, "adapt"), within=adapt),
                batches(batch_size=held_size, seed=derive(seed, "evaluate"), within=evaluate, needed=needed),
                gammas,
                task=self.task,
                suppression=suppression,
                accumulator=accumulator,
                names=names,
                runtime=self.runtime,
                seed=derive(seed, "noise"),
            )

    def _learner(self, architecture: Architecture, tuning: FineTuning, edits: tuple[Edit, ...]) -> nn.Module:
        """What this adversary trains: one for each structure; with adapters, which stay where they are put, a new one
        each time."""
        if tuning.train == "lora":
            return self.runtime.place(architecture.build(self.classes))
        if architecture == self.architecture:
            return self.learner
        if edits not in self._edited:
            self._edited[edits] = self.runtime.place(architecture.build(self.classes))
        return self._edited[edits]
