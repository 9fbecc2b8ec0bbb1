"""NTL, non-transferable learning (Wang et al., ICLR 2022), as SOPHON's baseline B3 (§5.1.2) uses it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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
from holdfast.features import Tap
from holdfast.neighbourhood import Making
from holdfast.optimisers import adam
from holdfast.seeding import seeded
from holdfast.separation import mmd
from holdfast.snapshots import Phase
from holdfast.training import fit


def ntl_loss(original: Tensor, restricted: Tensor, distance: Tensor, spec: NTL, strength: float = 1.0) -> Tensor:
    """L = L_o − s·min(a·L_r, b)·min(a′·MMD, b′): the losses of both domains and the distance of their features.

    Once a factor has reached its bound (b, b′), its gradient is gone: that is the method, not an accident.
    """
    pushed = (spec.loss_scale * restricted).clamp(max=spec.loss_bound)
    apart = (spec.distance_scale * distance).clamp(max=spec.distance_bound)
    return original - strength * pushed * apart


@dataclass(frozen=True)
class NTL(Guarded):
    """Hyper-parameters of supervised NTL; values behind which nothing is said are those of its published code.

    The model learns to be wrong on restricted images and to tell the domains apart in its features. Fine-tuning is
    not thought of: SOPHON's Table 1 has it back at 84 % after 20 epochs. Source-only, the restricted images are not
    looked at: images around the original domain, made by a GAN, stand for all there is beyond it.
    """

    iterations: int = 1000  # paper: 50 epochs
    lr: float = 1e-4  # Adam
    batch_size: int = 32  # of each domain
    loss_scale: float = 0.1  # a
    loss_bound: float = 1.0  # b
    distance_scale: float = 0.1  # a′
    distance_bound: float = 1.0  # b′
    kernels: int = 5  # Gaussian kernels of the MMD
    factor: float = 2.0  # between their widths
    auxiliary: Literal["restricted", "generated"] = "restricted"  # generated: source-only
    gan_steps: int = 1000  # source-only: of the GAN that learns the original domain; ours
    distances: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)  # source-only: MMD to which its copies leave; ours
    directions: int = 4  # source-only: parts of the channels, each held still once; ours
    leave_steps: int = 50  # source-only: of each copy; ours
    generated: int = 20  # source-only: images a class of each copy; ours
    tolerance: float = 0.05  # SOPHON's Table 1: 99.6 → 90.2 %; ours
    check_every: int = 50  # ours
    probe_steps: int = 50  # of the adversary behind the curve "restricted"; ours
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require_positive(self, "iterations", "check_every", "probe_steps", "kernels")
        require_rates(self, "lr")
        require(self.batch_size >= 2, f"batch_size must be at least 2, but got {self.batch_size}")
        for name in ("loss_scale", "loss_bound", "distance_scale", "distance_bound", "factor"):
            require(getattr(self, name) > 0, f"{name} must be positive, but got {getattr(self, name)}")
        require(
            self.auxiliary in ("restricted", "generated"),
            f"auxiliary must be restricted or generated, but got '{self.auxiliary}'",
        )
        require_positive(self, "gan_steps", "directions", "leave_steps", "generated")
        require(
            bool(self.distances) and all(d > 0 for d in self.distances),
            f"distances must be positive and not empty, but got {self.distances}",
        )
        require_tolerance(self)

    def check_classes(self, original: int, restricted: int) -> None:
        """One head serves both domains."""
        require(
            restricted <= original or self.auxiliary == "generated",
            f"head and classes do not agree: ntl needs a head for the restricted classes too, but there are "
            f"{restricted} of them and {original} original ones",
        )

    def engine(self, given: Given) -> _Engine:
        """Adam on the whole model."""
        return _Engine(self, given)


class _Engine(Engine):
    def __init__(self, spec: NTL, given: Given) -> None:
        self.spec, self.given = spec, given
        self.leaving = [(d, k) for d in spec.distances for k in range(spec.directions)]
        self.first = 0  # iterations before NTL's own
        self.adam = adam(given.model.parameters(), spec.lr)
        self.states = {"adam": self.adam}
        self.restricted_metric = Prober(given, spec.probe_steps)
        if spec.auxiliary == "generated":
            self.making = Making(given.original.train, len(given.original.classes), given.seed, given.runtime)
            self.states = {**self.states, "making": self.making}
            self.first = spec.gan_steps + len(self.leaving)
        self.length = self.first + spec.iterations

    def phase(self, iteration: int) -> Phase:
        """While images are made, the model waits."""
        return "free" if iteration <= self.first else "candidate"

    def _make(self, iteration: int) -> Mapping[str, float]:
        """A step of the GAN, or a copy of its generator that leaves."""
        number = iteration - 1 - self.spec.gan_steps
        if number < 0:
            return self.making.learn(iteration - 1)
        return {"away": self._copies(number + 1)}

    def _copies(self, wanted: int) -> float:
        """Have the first `wanted` copies: a state that was gone back to lacks those made since. Returns the last one's
        MMD to the domain; NaN where none was lacking."""
        spec, away = self.spec, math.nan
        there = len(self.making.labels) // (spec.generated * len(self.given.original.classes))
        for distance, direction in self.leaving[there:wanted]:
            away = self.making.go(distance, direction, spec.directions, spec.leave_steps, spec.generated)
        return away

    def iterate(self, iteration: int, strength: float) -> Mapping[str, float]:
        """One step on a batch of each domain; see `own_statistics`."""
        if iteration <= self.first:
            return self._make(iteration)
        spec, given, model = self.spec, self.given, self.given.model
        number = iteration - 1 - self.first
        if self.first:
            self._copies(len(self.leaving))
        other = self.making.result() if self.first else given.restricted
        ours = given.batches(given.original.train, spec.batch_size, "original", number)
        ((images, others),) = given.batches(other, spec.batch_size, "restricted", number)
        seen: dict[str, float] = {}

        def loss(outputs: Tensor, labels: Tensor) -> Tensor:
            kept, features = given.task.loss(outputs, labels), tap.value
            with own_statistics(model), given.runtime.autocast():
                answers = model(images)
            pushed = given.task.loss(answers, others)
            distance = mmd(features, tap.value, spec.kernels, spec.factor)
            seen.update({"original loss": kept.item(), "restricted loss": pushed.item(), "mmd": distance.item()})
            return ntl_loss(kept, pushed, distance, spec, strength)

        with Tap(model, given.head()[0]) as tap, seeded(given.seed, "ntl", iteration):
            result = fit(model, ours, loss, self.adam, runtime=given.runtime)
        return {"ntl": result.loss, **seen}
