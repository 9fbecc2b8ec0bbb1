"""UNSIR, unlearning by noise, impair and repair (Tarun et al., TNNLS 2023): a baseline of SKD and Reverse-MAML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from holdfast.defences.base import Engine, Given, Guarded, require_positive, require_rates, require_tolerance
from holdfast.defences.probing import Prober
from holdfast.domains import sample
from holdfast.errors import require
from holdfast.models import load_state
from holdfast.optimisers import adam
from holdfast.seeding import derive, generator, seeded
from holdfast.snapshots import Phase
from holdfast.tasks import Task
from holdfast.training import evaluate, fit


def noise_loss(outputs: Tensor, labels: Tensor, noise: Tensor, penalty: float, task: Task) -> Tensor:
    """−L(f(x), c) + penalty·mean_i Σ x_i²: images x that the model is most wrong about as class c, kept small."""
    return penalty * noise.square().flatten(1).sum(1).mean() - task.loss(outputs, labels)


@dataclass(frozen=True)
class UNSIR(Guarded):
    """Hyper-parameters of UNSIR; the defaults are those of its published code.

    The model first learns both domains (`learn_steps`: "initially trained on both"), with a joint head. Then, class by
    restricted class, images of noise that maximise the loss are made; one short epoch on these under the class's own
    label and on retained images impairs what the model knew; one on retained images alone repairs. What is released
    is the body with the original classes' part of the head. Every noise image carries its own class's label (the
    published notebook takes 3 images of each batch and labels all of them class 0).
    """

    learn_steps: int = 500  # of Adam at `learn_lr`; paper: until trained
    learn_lr: float = 1e-3
    noise_steps: int = 40  # 5 epochs of 8
    noise_lr: float = 0.1
    noise_penalty: float = 0.1
    noise_batch: int = 256  # images a class
    noise_copies: int = 20  # batches of noise a class in the impairing epoch
    retained: int = 1000  # images a class in the impairing epoch
    impair_lr: float = 0.02
    repair_lr: float = 0.01
    repair_epochs: int = 1
    batch_size: int = 256
    tolerance: float = 0.05  # ours
    check_every: int = 10  # ours
    probe_steps: int = 50  # of the adversary behind the curve "restricted"; ours
    compiles: ClassVar[bool] = True
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require_positive(self, "learn_steps", "noise_steps", "noise_batch", "noise_copies", "retained", "repair_epochs")
        require_positive(self, "check_every", "probe_steps")
        require_rates(self, "learn_lr", "noise_lr", "impair_lr", "repair_lr")
        require(self.batch_size >= 2, f"batch_size must be at least 2, but got {self.batch_size}")
        require(self.noise_penalty >= 0, f"noise_penalty must not be negative, but got {self.noise_penalty}")
        require_tolerance(self)

    def engine(self, given: Given) -> _Engine:
        """The joint model, the noise, and an Adam for each stage."""
        return _Engine(self, given)


class _Noise(nn.Module):
    """A batch of learnable images, (batch, c, h, w)."""

    def __init__(self, given: Given, spec: UNSIR, forget: int) -> None:
        super().__init__()
        shape = given.architecture.example(spec.noise_batch).shape
        drawn = torch.randn(shape, generator=generator(given.seed, "noise", forget))
        self.images = nn.Parameter(drawn.to(given.runtime.device))

    def forward(self, _: Tensor) -> Tensor:
        return self.images


class _Engine(Engine):
    def __init__(self, spec: UNSIR, given: Given) -> None:
        self.spec, self.given = spec, given
        self.kept = len(given.original.classes)
        self.heads = tuple(f"{h}." for h in given.head())
        self.joint = given.learner(self.kept + given.classes)
        self._join()
        self.noise = nn.ModuleList(_Noise(given, spec, c) for c in range(given.classes))
        self.labels = torch.arange(given.classes, device=given.runtime.device).repeat_interleave(spec.noise_batch)
        self.retained = sample(
            given.original.train,
            min(len(given.original.train), spec.retained * self.kept),
            derive(given.seed, "retained"),
        )
        some = given.restricted.subset(torch.arange(min(256, len(given.restricted))))
        self.forgotten = replace(some, labels=some.labels + self.kept)  # as the joint head counts
        self.adams = {
            name: adam(model.parameters(), lr)
            for name, model, lr in (
                ("learn", self.joint, spec.learn_lr),
                ("noise", self.noise, spec.noise_lr),
                ("impair", self.joint, spec.impair_lr),
                ("repair", self.joint, spec.repair_lr),
            )
        }
        self.states = {"joint": self.joint, "images": self.noise, **self.adams}
        noisy = len(self.labels) * spec.noise_copies
        self.pools = {"impair": noisy + len(self.retained), "repair": len(self.retained) * spec.repair_epochs}
        steps = {n: math.ceil(count / spec.batch_size) for n, count in self.pools.items()}
        self.plan = {"learn": spec.learn_steps, "noise": spec.noise_steps, **steps}
        self.length = sum(self.plan.values())
        self.restricted_metric = Prober(given, spec.probe_steps)

    def stage(self, iteration: int) -> tuple[str, int]:
        """The stage an iteration belongs to, and its number within, from 0."""
        left = iteration - 1
        for name, steps in self.plan.items():
            if left < steps:
                return name, left
            left -= steps
        raise ValueError(f"there is no iteration {iteration}")

    def phase(self, iteration: int) -> Phase:
        """Only a repaired model is one to release."""
        return "candidate" if self.stage(iteration)[0] == "repair" else "free"

    def iterate(self, iteration: int, strength: float) -> Mapping[str, float]:
        """One step of the stage. (`strength` means nothing here: what is impaired is impaired.)"""
        given = self.given
        stage, number = self.stage(iteration)
        work = {"learn": self._learn, "noise": self._noise, "impair": self._impair, "repair": self._repair}[stage]
        with seeded(given.seed, "unsir", iteration):
            loss = work(number)
        if stage != "noise":
            self._part()
        losses = {stage: loss}
        if stage != "noise" and (iteration % self.spec.check_every == 0 or iteration == self.length):
            losses["joint restricted"] = evaluate(self.joint, self.forgotten, given.task, given.runtime)[0]
        return losses

    def _learn(self, number: int) -> float:
        given, size = self.given, max(1, self.spec.batch_size // 2)
        (ours,) = given.batches(given.original.train, size, "original", number)
        (theirs,) = given.batches(given.restricted, size, "restricted", number)
        batch = torch.cat([ours[0], theirs[0]]), torch.cat([ours[1], theirs[1] + self.kept])
        return fit(self.joint, [batch], given.task.loss, self.adams["learn"], runtime=given.runtime).loss

    def _noise(self, number: int) -> float:
        given, penalty = self.given, self.spec.noise_penalty
        self.joint.requires_grad_(False).eval()

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            with given.runtime.autocast():
                outputs = self.joint(given.runtime.images(images))
            return noise_loss(outputs, labels, images, penalty, given.task)

        found = []
        for c, noise in enumerate(self.noise):  # Adam moves nothing that has no gradient
            asked = torch.full((self.spec.noise_batch,), c + self.kept, device=given.runtime.device)
            found.append(fit(noise, [(asked, asked)], loss, self.adams["noise"], runtime=given.runtime).loss)
        self.joint.requires_grad_(True)
        return sum(found) / len(found)

    def _impair(self, number: int) -> float:
        """Of one epoch over noise (each image `noise_copies` times) and retained images, shuffled."""
        given, spec = self.given, self.spec
        chosen = self._chosen("impair", number)
        noisy = len(self.labels) * spec.noise_copies
        where = chosen[chosen < noisy] % len(self.labels)
        retained = self.retained.batch(chosen[chosen >= noisy] - noisy, given.runtime)
        pools = [
            p.detach() for p in self.noise.parameters()
        ]  # a class each; of all classes too many to copy at every step
        made = [pools[n // spec.noise_batch][n % spec.noise_batch].unsqueeze(0) for n in where.tolist()]
        images = torch.cat([*made, retained[0]])
        labels = torch.cat([self.labels[where.to(self.labels.device)] + self.kept, retained[1]])
        batch = given.runtime.images(images), labels
        return fit(self.joint, [batch], given.task.loss, self.adams["impair"], runtime=given.runtime).loss

    def _repair(self, number: int) -> float:
        given = self.given
        batch = self.retained.batch(self._chosen("repair", number) % len(self.retained), given.runtime)
        return fit(self.joint, [batch], given.task.loss, self.adams["repair"], runtime=given.runtime).loss

    def _chosen(self, stage: str, number: int) -> Tensor:
        """Of equal parts, as nearly as may be: no step sees a stray batch of one."""
        count, steps = self.pools[stage], self.plan[stage]
        order = torch.randperm(count, generator=generator(self.given.seed, stage))
        return order[count * number // steps : count * (number + 1) // steps]

    def _join(self) -> None:
        """The model's weights into the joint one; the head's rows of the restricted classes stay fresh."""
        own, joint = self.given.model.state_dict(), self.joint.state_dict()
        for name, value in own.items():
            part = joint[name][: self.kept] if name.startswith(self.heads) else joint[name]
            part.copy_(value)

    def _part(self) -> None:
        """The joint model's weights into the model to be released, without the restricted classes' rows."""
        joint = self.joint.state_dict()
        load_state(self.given.model, {n: v[: self.kept] if n.startswith(self.heads) else v for n, v in joint.items()})
