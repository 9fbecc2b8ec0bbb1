"""The fine-tuning strategy φ (SOPHON, §2.2) as one frozen value, used by defence, audit and pre-training alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from holdfast.adapters import add_adapters
from holdfast.augmentation import augmented, check_augmentation
from holdfast.averaging import WeightAverage
from holdfast.domains import ImageData
from holdfast.errors import UserError, require, unknown
from holdfast.layers import initialise_head, last_layers, owned_tensors
from holdfast.models import Architecture, State, load_state
from holdfast.optimisers import OPTIMISERS, Parameters, keep_zeros
from holdfast.runtime import Runtime
from holdfast.seeding import derive, generator, seeded
from holdfast.tasks import Task
from holdfast.training import AfterStep, FitResult, fit, minibatches

Initialise = Literal["keep", "head", "last-k", "scratch"]
INITIALISE: tuple[Initialise, ...] = ("keep", "head", "last-k", "scratch")
Train = Literal["all", "head", "lora"]
MOST_LR = 1000.0  # Adadelta's best is sometimes far above 1


@dataclass(frozen=True)
class FineTuning:
    """Initialisation × what trains × optimisation.

    - `initialise`: `keep` the whole model, re-initialise the `head`, the `last-k` layers (`k`), or train from `scratch`
    - `train`: `all` parameters; the `head` alone (the body then stays in evaluation mode: its batch statistics too
      are the pre-trained ones); or `lora`: low-rank adapters of rank `rank` on every other layer, and the head
    - `schedule`: `constant` or `cosine` (to zero), after `warmup` steps of linear rise
    - `augment`: `none`, `shift`, `shift+flip`; `mixup`: the α of mixup's Beta distribution, 0 for none
    - `ema`: decay of the average of the weights that is evaluated and released in place of the last ones; 0 for none
    - `keep_zeros`: weights that are exactly zero at the start stay so, as by one who respects a pruning mask

    The defaults are SOPHON's default attack (§5.1.1): momentum 0.9, lr 1e-4, batch 200, weight decay 1e-4.
    """

    initialise: Initialise = "keep"
    train: Train = "all"
    optimiser: str = "momentum"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    batch_size: int = 200
    steps: int = 5000  # the paper's 20 epochs of 250
    k: int = 1
    rank: int = 8
    augment: str = "none"
    mixup: float = 0.0
    ema: float = 0.0
    keep_zeros: bool = False
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.initialise not in INITIALISE:
            raise unknown("initialisation", self.initialise, INITIALISE)
        require(self.train in ("all", "head", "lora"), f"train must be all, head or lora, but got '{self.train}'")
        check_augmentation(self.augment)
        require(0 <= self.ema < 1, f"ema must lie in [0, 1), but got {self.ema}")
        require(0 <= self.mixup <= 10, f"mixup must lie in [0, 10], but got {self.mixup}")
        if self.optimiser not in OPTIMISERS:
            raise unknown("optimiser", self.optimiser, OPTIMISERS)
        require(self.schedule in ("constant", "cosine"), f"schedule must be constant or cosine, got '{self.schedule}'")
        require(0 < self.lr <= MOST_LR, f"lr must lie in (0, {MOST_LR:g}], but got {self.lr}")
        require(0 <= self.weight_decay < 1, f"weight_decay must lie in [0, 1), but got {self.weight_decay}")
        for name, least in (("batch_size", 1), ("steps", 1), ("warmup", 0), ("k", 1), ("rank", 1)):
            require(getattr(self, name) >= least, f"{name} must be at least {least}, but got {getattr(self, name)}")

    @staticmethod
    def named(name: str, **changes: Any) -> FineTuning:
        """A strategy by its name in the literature, with the paper's default optimisation: `direct+all`, `initFC+FC`,
        `initFC+all`, `last-k+all`, `initFC+LoRA`, `direct+LoRA`, `scratch`."""
        if name not in ALIASES:
            raise unknown("fine-tuning strategy", name, ALIASES)
        initialise, train = ALIASES[name]
        return FineTuning(**{"initialise": initialise, "train": train, **changes})

    def control(self) -> FineTuning:
        """The same optimisation of a fresh model, all parameters trained: baseline B1 of this attack.

        Where the attack draws a new head, the control draws the same one: a head's initialisation alone can be worth
        some points, and must not count for the released body.
        """
        start: Initialise = "head" if self.initialise == "head" else "keep"
        return replace(self, initialise=start, train="all", k=1, rank=8, keep_zeros=False)

    def fresh_layers(self, model: nn.Module, architecture: Architecture, classes: int) -> list[str]:
        """Names of the modules that this strategy re-initialises (none for `keep`, and for `scratch`, which takes
        all). `UserError` where the model has no such layers."""
        if self.initialise in ("keep", "scratch"):
            return []
        if self.initialise == "head":
            heads = architecture.head(model, classes)
            require(bool(heads), "the model has no head to re-initialise: nothing in it depends on the classes")
            return heads
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
        """Mark what trains (`requires_grad`), and return it. For `lora`, adapters are added to `model` first."""
        if self.train == "all":
            chosen = list(model.parameters())
        else:
            heads = architecture.head(model, classes)
            require(bool(heads) or self.train == "lora", "the model has no head to train")
            chosen = [p for n, p in model.named_parameters() if n.startswith(tuple(f"{h}." for h in heads))]
            chosen += add_adapters(model, self.rank, heads) if self.train == "lora" else []
        trained = {id(p) for p in chosen}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        return chosen

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
        model.train(self.train != "head")

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
        shown: Collection[int] = (),
    ) -> FitResult:
        """Train `model` (already initialised, on the runtime's device) on `data`, in place, with `fit`. With `ema` the
        averaged weights are in `model` in the end, and at the steps `shown`, when `after_step` sees it."""
        batches = minibatches(data, self.batch_size, self.steps, derive(seed, "data"), runtime)
        batches = augmented(batches, self.augment, self.mixup, classes, seed)
        with seeded(seed, "run"):
            parameters = self.choose_parameters(model, architecture, classes)
            optimiser = self.build_optimiser(parameters)
            if self.keep_zeros:
                keep_zeros(optimiser, parameters)
            average = WeightAverage(model, self.ema) if self.ema else None
            result = fit(
                model,
                batches,
                task.loss,
                optimiser,
                runtime=runtime,
                forward=task.forward,
                schedule=self.build_schedule(optimiser),
                seed=derive(seed, "noise"),
                set_mode=self.set_mode,
                after_step=after_step if average is None else average.following(after_step, shown),
            )
            if average is not None and not result.diverged_at:
                average.apply()
            return result

    def run_from(
        self,
        state: State,
        model: nn.Module,
        data: ImageData,
        task: Task,
        architecture: Architecture,
        classes: int,
        *,
        runtime: Runtime,
        seed: int,
        steps: Sequence[int],
        note: Note,
        inspect: Callable[[nn.Module], None] | None = None,
        converged: float = 0.0,
    ) -> FitResult:
        """Initialise `model` from `state`, train it, and call `note(step, how)` at step 0 and at each of `steps`.

        `how` is `running`; `diverged` for the steps that a run with a loss that was not finite did not make (the model
        then is the broken one); `converged` for those after the mean training loss between two notes fell below
        `converged`. A true value from `note` ends the run. `inspect` sees the model after the first step, with that
        step's gradients still on it.
        """
        self.initialise_from(model, state, architecture, classes, seed)
        note(0, "running")
        recent: list[torch.Tensor] = []
        last, enough = 0, False

        def after_step(step: int, loss: torch.Tensor) -> bool:
            nonlocal last, enough
            if step == 1 and inspect is not None:
                inspect(model)
            recent.append(loss)
            if step not in steps:
                return False
            mean = torch.stack(recent).mean().item()
            if not math.isfinite(mean):  # on a GPU the loop has yet to notice
                return True
            last, quiet = step, mean < converged
            recent.clear()
            enough = bool(note(step, "running"))
            return enough or quiet

        result = self.run(
            model,
            data,
            task,
            architecture,
            classes,
            runtime=runtime,
            seed=seed,
            after_step=after_step,
            shown=steps,
        )
        if not enough:  # nothing is left of a run that made all its steps
            for step in (s for s in steps if s > last):
                if note(step, "diverged" if result.diverged_at else "converged"):
                    break
        return result


Note = Callable[[int, str], bool | None]

ALIASES: Mapping[str, tuple[Initialise, Train]] = MappingProxyType(
    {
        "direct+all": ("keep", "all"),
        "initFC+FC": ("head", "head"),
        "initFC+all": ("head", "all"),
        "last-k+all": ("last-k", "all"),
        "initFC+LoRA": ("head", "lora"),
        "direct+LoRA": ("keep", "lora"),
        "scratch": ("scratch", "all"),
    }
)
