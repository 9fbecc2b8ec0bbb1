"""SKD, selective knowledge distillation (Yang and Seeyave, "Transfer Resistant Model Training", 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.defences.base import (
    Engine,
    Flag,
    Given,
    Guarded,
    require_positive,
    require_rates,
    require_tolerance,
)
from holdfast.defences.probing import Prober
from holdfast.domains import ImageData
from holdfast.errors import require
from holdfast.features import Tap, last_rectifier, silences
from holdfast.finetuning import FineTuning
from holdfast.layers import WEIGHT_LAYERS, evaluating
from holdfast.models import load_state
from holdfast.optimisers import adam
from holdfast.runtime import Runtime
from holdfast.seeding import derive, seeded
from holdfast.snapshots import Phase
from holdfast.training import fit


def distillation_loss(student: Tensor, teacher: Tensor, target: float, strength: float = 1.0) -> Tensor:
    """Mean squared error of the student's pre-activations: on the first images, as many as `teacher` has rows, from
    the teacher's activations; on the others from the constant `target`.

    As over one collective data set: ( Σ ‖s_i − t_i‖² + strength·Σ ‖s_j − target‖² ) / number of entries of all s.
    """
    n = len(teacher)
    kept = F.mse_loss(student[:n].float(), teacher.float(), reduction="sum")
    pushed = (student[n:].float() - target).square().sum()
    return (kept + strength * pushed) / student.numel()


@torch.no_grad()
def misses(model: nn.Module, data: ImageData, head: str, runtime: Runtime, batch_size: int = 500) -> float:
    """The share of images with any live (positive) feature at the head's input: those on which SKD missed."""
    alive = 0
    with evaluating(model):
        for start in range(0, len(data), batch_size):
            images, _ = data.batch(torch.arange(start, min(start + batch_size, len(data))), runtime)
            with Tap(model, head) as tap, runtime.autocast():
                model(images)
            alive += int((tap.value.flatten(1) > 0).any(1).sum())
    return alive / len(data)


@dataclass(frozen=True)
class SKD(Guarded):
    """Hyper-parameters of SKD; the paper states −100 and little else, so all others are ours.

    The student is the model up to the layer before its last ReLU. It regresses to the unprotected model's (the
    teacher's) activations on original images, to `target` on restricted ones; with the ReLU behind it and that layer's
    bias at zero, restricted images have no live feature and no gradient. A new head is trained on original data alone,
    at every check, so that each state checked is one that could be released; in the first half none is.
    """

    target: float = -100.0  # paper: −100
    student: Literal["teacher", "fresh"] = "teacher"  # where it starts; paper: not stated
    zero_bias: bool = True  # paper: of the layer before the last ReLU
    iterations: int = 2000  # Adam steps
    lr: float = 3e-3
    batch_size: int = 128  # of each domain
    head_steps: int = 200  # of Adam at `head_lr`, at every check
    head_lr: float = 1e-2
    tolerance: float = 0.05
    check_every: int = 100
    probe_steps: int = 50  # of the adversary behind the curve "restricted"
    measures: ClassVar[bool] = True
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require_positive(self, "iterations", "batch_size", "head_steps", "check_every", "probe_steps")
        require_rates(self, "lr", "head_lr")
        require(self.student in ("teacher", "fresh"), f"student must be teacher or fresh, but got '{self.student}'")
        require(
            self.target < 0 and math.isfinite(self.target),
            f"target must be negative: a ReLU must cut it off; got {self.target}",
        )
        require_tolerance(self)

    def engine(self, given: Given) -> _Engine:
        """Teacher and student."""
        return _Engine(self, given)

    def measure(self, given: Given, restricted: ImageData) -> Mapping[str, float]:
        """`misses` of both domains: of the restricted one they should be none, of the original one all."""
        parts = {"restricted": restricted, "original": given.original.test}
        return {f"misses, {n}": misses(given.model, d, given.head()[0], given.runtime) for n, d in parts.items()}


class _Engine(Engine):
    def __init__(self, spec: SKD, given: Given) -> None:
        self.spec, self.given, self.length = spec, given, spec.iterations
        self.head = given.head()[0]
        example = given.architecture.example().to(given.runtime.device)
        self.activation, before = last_rectifier(given.model, example)
        require(
            silences(given.model, self.activation, self.head, torch.ones_like(example)),
            f"skd needs a network whose head sees nothing but what its last ReLU lets through, but something passes "
            f"'{self.activation}' by (a residual stream, another activation)",
        )
        self.teacher = given.learner(len(given.original.classes)).eval().requires_grad_(False)
        load_state(self.teacher, given.model.state_dict())
        self.bias = _bias(given.model, before) if spec.zero_bias else None
        head = tuple(f"{h}." for h in given.head())
        trained = [p for n, p in given.model.named_parameters() if not n.startswith(head) and n != self.bias]
        self.adam = adam(trained, spec.lr)
        self.begun = Flag()
        self.states = {"adam": self.adam, "begun": self.begun}
        self.restricted_metric = Prober(given, spec.probe_steps)

    def phase(self, iteration: int) -> Phase:
        """Restricted images at −100 are all of the loss at first; original ones are fitted after."""
        return "free" if iteration <= self.length // 2 else "candidate"

    def iterate(self, iteration: int, strength: float) -> Mapping[str, float]:
        """One step on a batch of each domain, in one pass; a new head where the state is to be checked."""
        spec, given, model = self.spec, self.given, self.given.model
        if not self.begun.up:
            self._begin()
        (ours,) = given.batches(given.original.train, spec.batch_size, "original", iteration - 1)
        (theirs,) = given.batches(given.restricted, spec.batch_size, "restricted", iteration - 1)
        with torch.no_grad(), Tap(self.teacher, self.activation, "output") as taught, given.runtime.autocast():
            self.teacher(ours[0])

        def loss(_: Tensor, __: Tensor) -> Tensor:
            return distillation_loss(tap.value, taught.value, spec.target, strength)

        both = torch.cat([ours[0], theirs[0]]), torch.cat([ours[1], theirs[1]])
        with Tap(model, self.activation) as tap, seeded(given.seed, "skd", iteration):
            found = fit(model, [both], loss, self.adam, runtime=given.runtime).loss
        losses = {"skd": found}
        if iteration % spec.check_every == 0 or iteration == self.length:
            self._new_head()
            losses["misses, training"] = misses(model, given.restricted, self.head, given.runtime)
        return losses

    @torch.no_grad()
    def _begin(self) -> None:
        given = self.given
        if self.spec.student == "fresh":
            fresh = given.architecture.build(len(given.original.classes), derive(given.seed, "student"))
            load_state(given.model, fresh.state_dict())
        if self.bias is not None:
            given.model.get_parameter(self.bias).zero_()
        self.begun.up = True

    def _new_head(self) -> None:
        """On original training data, the rest frozen (initFC+FC)."""
        spec, given = self.spec, self.given
        classes, seed = len(given.original.classes), derive(given.seed, "head")
        tuning = FineTuning.named(
            "initFC+FC",
            optimiser="adam",
            lr=spec.head_lr,
            weight_decay=0.0,
            schedule="cosine",
            batch_size=spec.batch_size,
            steps=spec.head_steps,
        )
        tuning.initialise_from(given.model, given.model.state_dict(), given.architecture, classes, seed)
        tuning.run(
            given.model, given.original.train, given.task, given.architecture, classes, runtime=given.runtime, seed=seed
        )
        given.model.train().requires_grad_(True)


def _bias(model: nn.Module, layer: str | None) -> str | None:
    """Name of the bias of the layer before the last activation; None where it has none, or something lies between."""
    module = model.get_submodule(layer) if layer else None
    # Not a normalisation's: with its shift at zero a channel's mean over both domains is zero, and for restricted
    # images at −100 original ones would have to lie at +100.
    if not isinstance(module, WEIGHT_LAYERS) or module.bias is None:
        return None
    return f"{layer}.bias"
