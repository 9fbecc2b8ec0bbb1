"""NTP, non-transferable pruning (Ding et al., ECCV 2024): ADMM under a loss that collapses restricted classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from holdfast.defences.base import (
    Engine,
    Given,
    Guarded,
    own_statistics,
    require_positive,
    require_rates,
    require_tolerance,
)
from holdfast.defences.probing import Prober
from holdfast.errors import require
from holdfast.optimisers import adam
from holdfast.pruning import ADMM, BUDGETS, Mask, keep_largest, prunable, soft_threshold, sparsity
from holdfast.seeding import seeded
from holdfast.separation import fisher_ratio, mmd
from holdfast.snapshots import Phase
from holdfast.tasks import Task
from holdfast.training import Beside, fit


def ntp_loss(original: Tensor, restricted: Tensor, regulariser: Tensor, spec: NTP, strength: float = 1.0) -> Tensor:
    """L = L_o − s·α·min(L_r, c) + s·γ·R: the losses of both domains, and the Fisher ratio (or −MMD) of the features."""
    pushed = restricted.clamp(max=spec.bound)
    return original - strength * (spec.alpha * pushed - spec.gamma * regulariser)


@dataclass(frozen=True)
class NTP(Guarded):
    """Hyper-parameters of NTP; the defaults are those of its published code, except where it says "ours".

    An iteration of the first stage is one of ADMM: `steps` steps of Adam on the loss and ρ/2·‖W − Z + U‖², then the
    projection and the dual update. It ends after `iterations`, or as soon as Z has the target sparsity and the primal
    and dual residuals are at most `residual`; then the mask is fixed (Z ≠ 0) and the weights left are trained on,
    without the penalty, for `retrain` iterations, in which the learning rate falls to zero along half a cosine (ours).
    Only masked states are judged and released.
    """

    regulariser: Literal["fisher", "mmd", "none"] = "fisher"
    alpha: float = 1.0
    bound: float = 10.0  # c; published code: 10 with the Fisher term, 3 with MMD
    gamma: float = 1e3  # of the Fisher ratio, or of −MMD
    rho: float = 0.005
    rho_growth: float = 1.0  # factor of ρ after every iteration of ADMM; published code: none
    projection: Literal["soft", "largest"] = "largest"  # published code: soft threshold; a target needs `largest`
    l1: float = 2.5e-5  # λ of the penalty λ‖Z‖₁ behind the soft threshold λ/ρ; ours
    sparsity: float = 0.95  # published code: stops above 0.95 to 0.99
    budget: str = "global"
    residual: float = 0.05  # primal and dual, relative; ours
    iterations: int = 100  # of ADMM, at most
    steps: int = 20  # of Adam an iteration; ours
    retrain: int = 20  # iterations with the mask fixed; ours
    lr: float = 1e-3
    weight_decay: float = 8e-4
    batch_size: int = 64  # of each domain; ours
    tolerance: float = 0.02  # ours
    check_every: int = 5  # ours
    probe_steps: int = 50  # of the adversary behind the curve "restricted"; ours
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require_positive(self, "iterations", "steps", "retrain", "check_every", "probe_steps")
        require_rates(self, "lr")
        require(self.batch_size >= 2, f"batch_size must be at least 2, but got {self.batch_size}")
        for name, valid in (
            ("regulariser", ("fisher", "mmd", "none")),
            ("projection", ("soft", "largest")),
            ("budget", BUDGETS),
        ):
            require(
                getattr(self, name) in valid, f"{name} must be one of {', '.join(valid)}, got {getattr(self, name)!r}"
            )
        for name in ("alpha", "gamma", "weight_decay"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, but got {getattr(self, name)}")
        for name in ("bound", "rho", "l1", "residual"):
            require(getattr(self, name) > 0, f"{name} must be positive, but got {getattr(self, name)}")
        require(1 <= self.rho_growth <= 10, f"rho_growth must lie in [1, 10], but got {self.rho_growth}")
        require(0 <= self.sparsity < 1, f"sparsity must lie in [0, 1), but got {self.sparsity}")
        require_tolerance(self)

    def suits(self, task: Task) -> bool:
        """Only the Fisher ratio needs labels."""
        return task.labelled or self.regulariser != "fisher"

    def check_classes(self, original: int, restricted: int) -> None:
        """One head serves both domains, where restricted images have a loss of their own."""
        require(
            self.alpha == 0 or restricted <= original,
            f"head and classes do not agree: ntp with alpha > 0 needs a head for the restricted classes too, but there "
            f"are {restricted} of them and {original} original ones",
        )

    def project(self, values: Mapping[str, Tensor], rho: float) -> dict[str, Tensor]:
        """The sparse tensors next to `values`, at penalty ρ."""
        if self.projection == "soft":
            return soft_threshold(values, self.l1 / rho)
        return keep_largest(values, self.sparsity, self.budget)

    def engine(self, given: Given) -> _Engine:
        """Adam, the multipliers, the mask."""
        return _Engine(self, given)


class _Engine(Engine):
    def __init__(self, spec: NTP, given: Given) -> None:
        self.spec, self.given, self.length = spec, given, spec.iterations + spec.retrain
        self.head = given.head()
        self.names = prunable(given.model, tuple(self.head))
        require(bool(self.names), "ntp prunes linear layers and convolutions before the head, but there are none")
        self.adam = adam(given.model.parameters(), spec.lr, weight_decay=spec.weight_decay)
        self.admm, self.mask = ADMM(self.weights(), spec.rho), Mask()
        self.states = {"adam": self.adam, "admm": self.admm, "mask": self.mask}
        self.restricted_metric = Prober(given, spec.probe_steps, initialise=("head",) if self.head else ("keep",))

    def weights(self) -> dict[str, Tensor]:
        """What is pruned."""
        return {n: self.given.model.get_parameter(n) for n in self.names}

    def phase(self, iteration: int) -> Phase:
        """Until the mask is fixed, the weights are not yet sparse, and what they lose is trained back after."""
        return "candidate" if self.mask.kept else "free"

    def done(self, iteration: int) -> bool:
        """`retrain` iterations after the mask was fixed."""
        return bool(self.mask.kept) and iteration >= self.mask.since + self.spec.retrain

    def iterate(self, iteration: int, strength: float) -> Mapping[str, float]:
        """One iteration of ADMM, or of training what is left."""
        spec, weights = self.spec, self.weights()
        losses = self._train(iteration, strength)
        if self.mask.kept:
            return {**losses, "sparsity": sparsity(weights)}
        primal, dual = self.admm.update(weights, lambda values: spec.project(values, self.admm.rho))
        reached = sparsity(self.admm.z)
        sparse = spec.projection == "largest" or reached >= spec.sparsity
        self.admm.strengthen(self.admm.rho * spec.rho_growth)
        if iteration >= spec.iterations or (sparse and max(primal, dual) <= spec.residual):
            self.mask.fix(self.admm.z, iteration)
            self.mask.enforce(weights)
        return {**losses, "primal": primal, "dual": dual, "sparsity": reached}

    def _train(self, iteration: int, strength: float) -> dict[str, float]:
        """`steps` steps, each on a batch of each domain; see `own_statistics`."""
        spec, given, weights, model = self.spec, self.given, self.weights(), self.given.model
        for group in self.adam.param_groups:
            group["lr"] = spec.lr * self._lr_factor(iteration)
        first = (iteration - 1) * spec.steps
        ours = given.batches(given.original.train, spec.batch_size, "original", first, spec.steps)
        both = Beside(ours, given.batches(given.restricted, spec.batch_size, "restricted", first, spec.steps))
        seen: dict[str, float] = {}

        def loss(outputs: Tensor, labels: Tensor) -> Tensor:
            kept, features = given.task.loss(outputs, labels), tap.value
            images, others = both.of(labels)
            with own_statistics(model), given.runtime.autocast():
                answers = given.task.forward(model, images, others)
            term = self._regulariser(features, tap.value, others)
            # With α = 0 the head need not have the restricted classes.
            pushed = given.task.loss(answers, others) if spec.alpha else torch.zeros_like(kept)
            seen.update({"original loss": kept.item(), "restricted loss": pushed.item(), spec.regulariser: term.item()})
            found = ntp_loss(kept, pushed, term, spec, strength)
            return found if self.mask.kept else found + self.admm.penalty(weights)

        with given.tap() as tap, seeded(given.seed, "ntp", iteration):
            result = fit(
                model,
                both,
                loss,
                self.adam,
                runtime=given.runtime,
                forward=given.task.forward,
                after_step=lambda *_: self.mask.enforce(weights),
            )
        return {"ntp": math.nan if result.diverged_at else result.loss, **seen}

    def _lr_factor(self, iteration: int) -> float:
        """1 until the mask is fixed, then ½·(1 + cos π·progress): what swings about an optimum misses the tolerance."""
        after = iteration - 1 - self.mask.since if self.mask.kept else 0
        return 0.5 * (1 + math.cos(math.pi * after / self.spec.retrain))

    def _regulariser(self, original: Tensor, restricted: Tensor, labels: Tensor) -> Tensor:
        if self.spec.regulariser == "fisher":
            return fisher_ratio(restricted, labels)
        if self.spec.regulariser == "mmd":
            return -mmd(original, restricted)
        return torch.zeros((), device=restricted.device)
