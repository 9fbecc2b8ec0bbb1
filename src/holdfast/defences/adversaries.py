"""Φ: the adversaries that a defence simulates (SOPHON, §4.1.1 and §5.1.1), and, ours, those that edit first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from holdfast.adapters import check_adapters
from holdfast.attacks.edits import EDITS, make_edit
from holdfast.attacks.released import Edit, Released
from holdfast.defences.base import Given, Guarded, require_positive
from holdfast.errors import require, unknown
from holdfast.finetuning import FineTuning, Initialise, Train
from holdfast.models import state_of
from holdfast.optimisers import OPTIMISERS
from holdfast.seeding import generator

INITIALISED: tuple[Initialise, ...] = ("keep", "head", "last-k")
TRAINED: tuple[Train, ...] = ("all", "head", "lora")


@dataclass(frozen=True)
class Adversaries(Guarded):
    """What suppresses the simulated adversaries, and what they are drawn from, each value uniformly. The defaults are
    the paper's; `last-k`, what is trained, and `inner_edits` are ours, all as the audit has them.

    `inner_edits`: edits of which an adversary makes one, or, as often, none. Suppression takes the gradient at the
    edited weights for that at the protected ones, name by name, as it takes those along the path for those at its
    start (first order); so only edits that keep every weight's name and scale can be simulated.
    """

    suppression: str | None = None  # paper: ICE (Eq. 11) or KLU (Eq. 13), §4.3.1; DoS (Eq. 16), §4.3.2; null: ICE, DoS
    adversaries: int = 3  # N; paper: one task on each of three GPUs, §5.1.1
    inner_steps: int = 50  # K; paper: 50
    inner_initialise: tuple[Initialise, ...] = (
        "keep",
        "head",
    )  # paper: entire model, or all but the final layer, §4.1.1
    inner_k: tuple[int, ...] = (2, 3)  # layers anew, where `last-k` is drawn; ours
    inner_train: tuple[Train, ...] = ("all",)  # paper: all; ours: also the head alone, and low-rank adapters
    inner_lr: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # paper: these
    inner_batch_size: tuple[int, ...] = (50, 100, 150, 200, 250)  # paper: these
    inner_optimiser: tuple[str, ...] = ("adam",)  # paper: Adam
    inner_edits: tuple[Any, ...] = ()  # ours; as an attack's: names, or mappings with a name
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner_edits", tuple(make_edit(e) for e in self.inner_edits))
        require_positive(self, "adversaries", "inner_steps")
        for name in (
            "inner_initialise",
            "inner_k",
            "inner_train",
            "inner_lr",
            "inner_batch_size",
            "inner_optimiser",
        ):
            require(bool(getattr(self, name)), f"{name} must not be empty")
        known: dict[str, tuple[str, ...]] = {"inner_initialise": INITIALISED, "inner_train": TRAINED}
        for name, valid in known.items():
            for value in getattr(self, name):
                require(value in valid, f"{name} holds '{value}'; valid: {', '.join(valid)}")
        require(min(self.inner_k) >= 1, f"inner_k must be at least 1, but got {min(self.inner_k)}")
        for optimiser in self.inner_optimiser:
            if optimiser not in OPTIMISERS:
                raise unknown("optimiser", optimiser, OPTIMISERS)
        require(all(0 < lr <= 10 for lr in self.inner_lr), f"inner_lr must lie in (0, 10], but got {self.inner_lr}")
        require(min(self.inner_batch_size) >= 2, f"inner_batch_size must be at least 2, got {self.inner_batch_size}")
        able = sorted(n for n, e in EDITS.items() if getattr(e, "carries", False))
        for edit in self.inner_edits:
            require(
                getattr(edit, "carries", False),
                f"inner_edits holds '{edit.name}', which does not keep every weight in its place; valid: "
                f"{', '.join(able)}",
            )

    def draw(self, seed: int, *stream: str | int) -> FineTuning:
        """One adversary φ ~ Φ: initialisation × learning rate × batch size × optimiser × what is trained."""
        rng = generator(seed, "adversary", *stream)

        def pick(values: tuple[Any, ...]) -> Any:
            return _pick(values, rng)

        drawn = {
            "initialise": pick(self.inner_initialise),
            "optimiser": pick(self.inner_optimiser),
            "lr": pick(self.inner_lr),
            "batch_size": pick(self.inner_batch_size),
            "train": pick(self.inner_train),
        }
        # Decay: not stated in the paper; it only adds a shrinking that is the same for every θ.
        k = pick(self.inner_k) if drawn["initialise"] == "last-k" else 1
        return FineTuning(**drawn, weight_decay=0.0, steps=self.inner_steps, k=k)

    def draw_edits(self, seed: int, *stream: str | int) -> tuple[Edit, ...]:
        """The edit that this adversary makes first, or none."""
        if not self.inner_edits:
            return ()
        choices: list[tuple[Edit, ...]] = [(), *((e,) for e in self.inner_edits)]
        found: tuple[Edit, ...] = _pick(choices, generator(seed, "adversary", "edit", *stream))
        return found

    def simulates(self, tuning: FineTuning, edits: Sequence[Any] = ()) -> bool:
        """Whether an attack's initialisation, optimiser, learning rate, what it trains and its edits were all
        simulated, on images as they are (batch sizes and decay hardly matter beside these, and do not count)."""
        return (
            tuning.train in self.inner_train
            and tuning.augment == "none"
            and not (tuning.mixup or tuning.ema or tuning.warmup or tuning.keep_zeros)
            and tuning.schedule == "constant"
            and tuning.initialise in self.inner_initialise
            and (tuning.initialise != "last-k" or tuning.k in self.inner_k)
            and tuning.optimiser in self.inner_optimiser
            and any(math.isclose(tuning.lr, lr) for lr in self.inner_lr)
            and (not edits or tuple(edits) in [(e,) for e in self.inner_edits])
        )

    def check_head(self, heads: Sequence[str]) -> None:
        """`UserError` where a simulated adversary would re-initialise, or train, a head that there is not."""
        require(
            bool(heads) or "head" not in self.inner_train,
            "the model has no head that a simulated adversary could train alone; leave head out of defence.inner_train",
        )
        require(
            bool(heads) or "head" not in self.inner_initialise,
            "the model has no head that a simulated adversary could re-initialise; set defence.inner_initialise to "
            "[keep]",
        )

    def check_classes(self, original: int, restricted: int) -> None:
        """`UserError` where a simulated adversary would keep a head of the wrong size."""
        require(
            "keep" not in self.inner_initialise or original == restricted,
            f"head and classes do not agree: an adversary that keeps the head needs as many restricted classes as "
            f"original ones, but there are {restricted} and {original}; set defence.inner_initialise to [head]",
        )

    def check_adversaries(self, given: Given) -> None:
        """`UserError` where this network allows an adversary of Φ no attack; only for those that are ours."""
        structural = "lora" in self.inner_train or self.inner_edits
        require(
            not structural or given.runtime.sharing.count == 1,
            "inner_edits and inner_train: lora need the whole network in every process; set runtime.shard: false",
        )
        require(
            not structural or not given.runtime.compile,
            "inner_edits and inner_train: lora make a new network for an adversary, each of which would be compiled "
            "anew; set runtime.compile: false",
        )
        if "last-k" in self.inner_initialise:
            for k in self.inner_k:
                tuning = FineTuning(initialise="last-k", k=k)
                _ = tuning.fresh_layers(given.model, given.architecture, len(given.original.classes))
        if "lora" in self.inner_train:
            check_adapters(given.model, FineTuning.rank, given.head())
        if not self.inner_edits:
            return
        released = Released(given.architecture, state_of(given.model), len(given.original.classes))
        for edit in self.inner_edits:
            why = edit.obstacle(released)
            require(why is None, f"inner_edits: '{edit.name}' does not apply to this network: {why}")


def _pick(values: Sequence[Any], rng: torch.Generator) -> Any:
    return values[int(torch.randint(len(values), (), generator=rng))]
