"""The fine-tuning strategy φ (SOPHON, §2.2) as one frozen value, used by defence, audit and pre-training alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from holdfast.domains import ImageData
from holdfast.errors import UserError, require, unknown
from holdfast.layers import initialise_head, last_layers, owned_tensors
from holdfast.models import Architecture, State, load_state
from holdfast.runtime import Runtime
from holdfast.seeding import derive, generator, seeded
from holdfast.tasks import Task
from holdfast.training import AfterStep, FitResult, fit, minibatches

Parameters = Iterable[nn.Parameter]
Maker = Callable[[Parameters, float, float], torch.optim.Optimizer]

# Momentum is 0.9 as in the paper's attack. `foreach` spares small models most of the Python between kernels.
OPTIMISERS: Mapping[str, Maker] = MappingProxyType(
    {
        "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr, weight_decay=wd, foreach=True),
        "momentum": lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=wd, foreach=True),
        "nesterov": lambda p, lr, wd: torch.optim.SGD(
            p, lr, momentum=0.9, weight_decay=wd, nesterov=True, foreach=True
        ),
        "adagrad": lambda p, lr, wd: torch.optim.Adagrad(p, lr, weight_decay=wd, foreach=True),
        "adadelta": lambda p, lr, wd: torch.optim.Adadelta(p, lr, weight_decay=wd, foreach=True),
        "adam": lambda p, lr, wd: torch.optim.Adam(p, lr, weight_decay=wd, foreach=True),
        "adamw": lambda p, lr, wd: torch.optim.AdamW(p, lr, weight_decay=wd, foreach=True),
    }
)

Initialise = Literal["keep", "head", "last-k", "scratch"]


@dataclass(frozen=True)
class FineTuning:
    """Initialisation × what trains × optimisation.

    - `initialise`: `keep` the whole model, re-initialise the `head`, the `last-k` layers (`k`), or train from `scratch`
    - `train`: `all` parameters, or the `head` alone (the body then stays in evaluation mode: its batch statistics too
      are the pre-trained ones)
    - `schedule`: `constant` or `cosine` (to zero), after `warmup` steps of linear rise

    The defaults are SOPHON's default attack (§5.1.1): momentum 0.9, lr 1e-4, batch 200, weight decay 1e-4.
    """

    initialise: Initialise = "keep"
    train: Literal["all", "head"] = "all"
    optimiser: str = "momentum"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    batch_size: int = 200
    steps: int = 5000  # the paper's 20 epochs of 250
    k: int = 1
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(self.initialise in ("keep", "head", "last-k", "scratch"), f"initialise: '{self.initialise}' is unknown")
        require(self.train in ("all", "head"), f"train must be 'all' or 'head', but got '{self.train}'")
        if self.optimiser not in OPTIMISERS:
            raise unknown("optimiser", self.optimiser, OPTIMISERS)
        require(self.schedule in ("constant", "cosine"), f"schedule must be constant or cosine, got '{self.schedule}'")
        require(0 < self.lr <= 10, f"lr must lie in (0, 10], but got {self.lr}")
        require(0 <= self.weight_decay < 1, f"weight_decay must lie in [0, 1), but got {self.weight_decay}")
        for name, least in (("batch_size", 1), ("steps", 1), ("warmup", 0), ("k", 1)):
            require(getattr(self, name) >= least, f"{name} must be at least {least}, but got {getattr(self, name)}")

    @staticmethod
    def named(name: str, **changes: Any) -> FineTuning:
        """A strategy by its name in the literature, with the paper's default optimisation: `direct+all`, `initFC+FC`,
        `initFC+all`, `last-k+all`, `scratch`."""
        if name not in ALIASES:
            raise unknown("fine-tuning strategy", name, ALIASES)
        initialise, train = ALIASES[name]
        return FineTuning(**{"initialise": initialise, "train": train, **changes})

    def control(self) -> FineTuning:
        """The same optimisation from scratch, all parameters trained: baseline B1 of this attack."""
        return replace(self, initialise="scratch", train="all", k=1)

    def fresh_layers(self, model: nn.Module, architecture: Architecture, classes: int) -> list[str]:
        """Names of the modules that this strategy re-initialises (none for `keep`, and for `scratch`, which takes
        all). `UserError` where the model has no such layers."""
        if self.initialise in ("keep", "scratch"):
            return []
        if self.initialise == "head":
            return architecture.head(model, classes)
        return last_layers(model, self.k, architecture.example().to(next(model.parameters()).device))

    def initialise_from(
        self, model: nn.Module, state: State, architecture: Architecture, classes: int, seed: int
    ) -> set[str]:
        """Set `model`, built for `classes`, to the start of this attack on the weights `state`, in place.

        Returns the names of the parameters that were re-initialised. Raises `UserError` where a kept head has another
        number of classes.
        """
        parameters = {n for n, _ in model.named_parameters()}
        if self.initialise == "scratch":
            load_state(model, architecture.build(classes, derive(seed, "scratch")).state_dict())
            return parameters
        layers = self.fresh_layers(model, architecture, classes)
        own = model.state_dict()
        if not layers:
            self._check_head(own, state)
        # Only the tensors that a layer owns itself: a block may own one (a scale), and hold much that is to be kept.
        fresh = {n for layer in layers for n in owned_tensors(model, layer)}
        source = own
        if self.initialise == "last-k":
            source = architecture.build(classes, derive(seed, "last-k")).state_dict()
        kept = {n: v for n, v in state.items() if n not in fresh}
        load_state(model, {**kept, **{n: source[n] for n in fresh}})
        if self.initialise == "head":
            for name in layers:
                initialise_head(model.get_submodule(name), generator(seed, "head", name))
        return fresh & parameters

    def _check_head(self, own: Mapping[str, torch.Tensor], state: State) -> None:
        wrong = [n for n in own if n in state and own[n].shape != state[n].shape]
        if wrong:
            raise UserError(
                f"head and classes do not agree: 'direct' fine-tuning keeps the head, but '{wrong[-1]}' is "
                f"{tuple(state[wrong[-1]].shape)} in the weights and {tuple(own[wrong[-1]].shape)} for the restricted "
                "domain; use initFC+FC, initFC+all or last-k+all, or domains with equally many classes"
            )

    def choose_parameters(self, model: nn.Module, architecture: Architecture, classes: int) -> list[nn.Parameter]:
        """Mark what trains (`requires_grad`), and return it."""
        names = tuple(f"{n}." for n in architecture.head(model, classes)) if self.train == "head" else ()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not names or name.startswith(names))
        return [p for p in model.parameters() if p.requires_grad]

    def build_optimiser(self, parameters: Parameters) -> torch.optim.Optimizer:
        """The optimiser over `parameters`."""
        return OPTIMISERS[self.optimiser](parameters, self.lr, self.weight_decay)

    def build_schedule(self, optimiser: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR | None:
        """The learning-rate schedule; None where it is constant throughout."""
        if self.schedule == "constant" and self.warmup == 0:
            return None
        return torch.optim.lr_scheduler.LambdaLR(optimiser, self.lr_factor)

    def lr_factor(self, step: int) -> float:
        """lr at step (from 0) ÷ `lr`: (step + 1)/warmup while it rises, then 1 or ½·(1 + cos π·progress)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def set_mode(self, model: nn.Module) -> None:
        """Training mode; where only the head trains, evaluation mode."""
        model.train(self.train == "all")

    def run(
        self,
        model: nn.Module,
        data: ImageData,
        task: Task,
        architecture: Architecture,
        classes: int,
        *,
        runtime: Runtime,
        seed: int,
        after_step: AfterStep | None = None,
    ) -> FitResult:
        """Train `model` (already initialised, on the runtime's device) on `data`, in place, with `fit`."""
        parameters = self.choose_parameters(model, architecture, classes)
        optimiser = self.build_optimiser(parameters)
        with seeded(seed, "run"):
            return fit(
                model,
                minibatches(data, self.batch_size, self.steps, derive(seed, "data"), runtime),
                task.loss,
                optimiser,
                runtime=runtime,
                schedule=self.build_schedule(optimiser),
                seed=derive(seed, "noise"),
                set_mode=self.set_mode,
                after_step=after_step,
            )


ALIASES: Mapping[str, tuple[Initialise, Literal["all", "head"]]] = MappingProxyType(
    {
        "direct+all": ("keep", "all"),
        "initFC+FC": ("head", "head"),
        "initFC+all": ("head", "all"),
        "last-k+all": ("last-k", "all"),
        "scratch": ("scratch", "all"),
    }
)
