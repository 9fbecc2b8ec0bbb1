"""What an attacker holds (a released model) and has (data), and what an edit does to the one by means of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from holdfast.domains import ImageData
from holdfast.finetuning import FineTuning
from holdfast.flops import training_flops
from holdfast.models import Architecture, State, load_state, state_of
from holdfast.optimisers import passes
from holdfast.runtime import Runtime
from holdfast.seeding import derive
from holdfast.tasks import Loss, Task
from holdfast.training import Batch, FitResult, Forward, fit, minibatches

WEIGHTS_ONLY = "weights only"
ORIGINAL_DATA = "some original data"
THIRD_DOMAIN = "data of a third domain"
DEFENCE_KNOWN = "knowledge of the defence"


@dataclass(frozen=True)
class Released:
    """A model as the attacker has it: how to build it, its weights, the outputs of its head."""

    architecture: Architecture
    state: State
    classes: int

    def build(self, runtime: Runtime) -> nn.Module:
        """The model with its weights, on the runtime's device."""
        model = runtime.place(self.architecture.build(self.classes))
        load_state(model, self.state)
        return model

    def having(self, model: nn.Module) -> Released:
        """The same model with the weights of `model`."""
        return replace(self, state=state_of(model))

    @cached_property
    def _head(self) -> list[str]:
        return self.architecture.head(self.architecture.build(self.classes), self.classes)

    def head(self) -> list[str]:
        """Names of the head's layers; none for a model without classes."""
        return self._head


@dataclass(frozen=True)
class Restructured:
    """A model factory: a base architecture, changed after it was built. Equal parts give equal structure."""

    base: Architecture
    change: Callable[[nn.Module], nn.Module]

    def __call__(self, classes: int) -> nn.Module:
        return self.change(self.base.construct(classes))


@dataclass
class Means:
    """What the attacker has beside the weights: its restricted data, and perhaps some original data or a third domain.

    `steps`: the audit's budget, of which edits that train take a share. `samples`, `flops`: what those have spent.
    An edit may add to `restricted` what the attack is then to train on.
    """

    restricted: ImageData
    task: Task
    runtime: Runtime
    seed: int
    steps: int
    original: ImageData | None = None
    benign: ImageData | None = None
    samples: int = 0
    flops: float = 0.0

    def images(self, most: int = 256) -> torch.Tensor:
        """Up to `most` of the attacker's restricted images, normalised, on the device; of all classes, which lie one
        after the other."""
        count = min(most, len(self.restricted))
        where = torch.arange(count) * len(self.restricted) // count
        return self.restricted.batch(where, self.runtime)[0]

    def train(
        self,
        model: nn.Module,
        data: ImageData,
        tuning: FineTuning,
        stream: str,
        *,
        loss: Loss | None = None,
        forward: Forward | None = None,
        prepare: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda batches: batches,
    ) -> FitResult:
        """Train all of `model` on `data` in place, before the attack proper, and add what it cost."""
        model.requires_grad_(True)
        optimiser = tuning.build_optimiser(model.parameters())
        batch = min(tuning.batch_size, len(data))
        batches = minibatches(data, batch, tuning.steps, derive(self.seed, stream, "data"), self.runtime)
        result = fit(
            model,
            prepare(batches),
            loss or self.task.loss,
            optimiser,
            runtime=self.runtime,
            forward=forward or self.task.forward,
            schedule=tuning.build_schedule(optimiser),
            seed=derive(self.seed, stream, "noise"),
        )
        example = data.batch(torch.arange(1), self.runtime)[0]
        self.samples += result.steps * batch
        self.flops += result.steps * batch * training_flops(model, example, passes(tuning.optimiser))
        return result


class Edit(Protocol):
    """A change to released weights before fine-tuning. A frozen dataclass; its fields are its strengths."""

    needs: ClassVar[str]
    """What the attacker must have."""
    revives: ClassVar[bool]
    """Whether it can bring units back to life whose gradients are zero."""
    fresh: ClassVar[bool]
    """Whether someone who trains from scratch would do it too: then the from-scratch control gets it."""
    carries: ClassVar[bool]
    """Whether every weight keeps its name and, but for something added, its value: then a defence can simulate it."""

    def apply(self, released: Released, means: Means) -> Released:
        """The edited model. Never changes `released`."""
        ...

    def obstacle(self, released: Released) -> str | None:
        """Why the edit does not apply to this model; None where it does."""
        ...

    def summary(self) -> str:
        """One line: what it does, and with what strength."""
        ...


def forgotten(edits: Iterable[Any], model: nn.Module) -> set[str]:
    """Names of parameters whose values the edits replace: what an edit's method `forgets` says, where it has one."""
    return {name for e in edits if hasattr(e, "forgets") for name in e.forgets(model)}


def described(edit: Any) -> str:
    """The first line of an edit's docstring and its fields."""
    fields = {n: v for n, v in vars(edit).items() if n != "name"}
    shown = ", ".join(f"{n} {v:g}" if isinstance(v, float) else f"{n} {v}" for n, v in fields.items())
    return (type(edit).__doc__ or "").strip().split("\n")[0].rstrip(".") + (f" ({shown})" if shown else "")
