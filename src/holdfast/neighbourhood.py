"""Images around a domain, made from that domain alone: NTL's generative adversarial augmentation (Wang et al., ICLR
2022), for those who do not know what is to be restricted.

A conditional GAN learns the domain; then copies of its generator are pushed away from it, each to a given distance and
with another part of its channels held still, so that they leave in different directions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.domains import ImageData
from holdfast.errors import require
from holdfast.preprocessing import Preprocessing
from holdfast.runtime import Runtime
from holdfast.seeding import derive, generator, seeded
from holdfast.separation import mmd
from holdfast.training import minibatches

NOISE = 64  # entries of the generator's noise


class Generator(nn.Module):
    """Noise (n, NOISE) and labels (n,) to images (n, c, size, size) in the domain's normalised range."""

    def __init__(self, preprocessing: Preprocessing, classes: int, width: int = 32) -> None:
        super().__init__()
        size = preprocessing.size
        require(size % 4 == 0, f"source-only NTL needs an image size that 4 divides, but got {size}")
        self.classes, self.start, self.width = classes, size // 4, width
        self.dense = nn.Linear(NOISE + classes, 2 * width * self.start**2)
        self.first, self.second = nn.BatchNorm2d(2 * width), nn.BatchNorm2d(width)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.out = nn.Conv2d(width, preprocessing.channels, 3, padding=1)
        black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
        ends = preprocessing.normalise(black_and_white.repeat(1, preprocessing.channels, 1, 1))
        self.register_buffer("low", ends[:1])
        self.register_buffer("high", ends[1:])

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        given = torch.cat([noise, F.one_hot(labels, self.classes).to(noise)], dim=1)
        x = self.dense(given).view(-1, 2 * self.width, self.start, self.start)
        x = F.interpolate(F.relu(self.first(x)), scale_factor=2)
        x = F.interpolate(F.relu(self.second(self.up(x))), scale_factor=2)
        low, high = self.get_buffer("low"), self.get_buffer("high")
        return low + (high - low) * torch.sigmoid(self.out(x))


class Discriminator(nn.Module):
    """Images to features (n, f), realness (n,) and class logits (n, C)."""

    def __init__(self, channels: int, size: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
        )
        features = 2 * width * ((size + 3) // 4) ** 2
        self.real, self.label = nn.Linear(features, 1), nn.Linear(features, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.body(images)
        return features, self.real(features).squeeze(1), self.label(features)


def discriminator_loss(model: Discriminator, real: Tensor, labels: Tensor, made: Tensor) -> Tensor:
    """Least squares: (D(x) − 1)² + D(G(z))², and the cross-entropy of the real images' classes."""
    _, truth, answers = model(real)
    _, lie, _ = model(made.detach())
    found: Tensor = (truth - 1).square().mean() + lie.square().mean() + F.cross_entropy(answers, labels)
    return found


def generator_loss(model: Discriminator, made: Tensor, labels: Tensor) -> Tensor:
    """(D(G(z)) − 1)² and the cross-entropy of the classes that were asked for."""
    _, believed, answers = model(made)
    found: Tensor = (believed - 1).square().mean() + F.cross_entropy(answers, labels)
    return found


def leaving_loss(model: Discriminator, real: Tensor, made: Tensor, labels: Tensor, distance: float) -> Tensor:
    """−min(MMD of the discriminator's features, `distance`), and the cross-entropy of the classes asked for: away from
    the domain, no further than `distance`, and still what it is said to be."""
    features, _, answers = model(made)
    apart = mmd(model.body(real).detach(), features).clamp(max=distance)
    found: Tensor = F.cross_entropy(answers, labels) - apart
    return found


def held_still(module: nn.Module, direction: int, directions: int) -> dict[str, Tensor]:
    """For every weight, 0 where an output channel belongs to part `direction` of `directions`, else 1: multiplied with
    the gradients, it leaves that part as it was."""
    masks = {}
    for name, value in module.named_parameters():
        mask = torch.ones_like(value)
        count = len(value)
        mask[count * direction // directions : count * (direction + 1) // directions] = 0
        masks[name] = mask
    return masks


def leave(
    start: Generator,
    judge: Discriminator,
    batches: Iterator[tuple[Tensor, Tensor]],
    distance: float,
    direction: int,
    directions: int,
    lr: float,
    rng: torch.Generator,
) -> Generator:
    """A copy of `start`, pushed to `distance` with one part of its channels held still, a step for every batch."""
    away = copy.deepcopy(start)
    masks = held_still(away, direction, directions)
    adam = torch.optim.Adam(away.parameters(), lr)
    for images, labels in batches:
        noise = torch.randn(len(labels), NOISE, generator=rng).to(images.device)
        adam.zero_grad()
        leaving_loss(judge, images, away(noise, labels), labels, distance).backward()  # type: ignore[no-untyped-call]
        for name, value in away.named_parameters():
            if value.grad is not None:
                value.grad.mul_(masks[name])
        adam.step()
    return away


@torch.no_grad()
def make_images(
    source: Generator, each: int, rng: torch.Generator, preprocessing: Preprocessing
) -> tuple[Tensor, Tensor]:
    """`each` images of every class, as uint8 (n, c, h, w) on the CPU, and their labels (n,)."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    asked = torch.arange(source.classes).repeat_interleave(each)
    device = source.dense.weight.device
    made = source.eval()(torch.randn(len(asked), NOISE, generator=rng).to(device), asked.to(device)).cpu()
    return ((made * std + mean) * 255).round().clamp(0, 255).to(torch.uint8), asked


class Making:
    """The GAN, and the images made so far, as one state that can go back: `steps` of the GAN, then one copy of the
    generator for every pair of `distances` × directions."""

    def __init__(
        self, data: ImageData, classes: int, seed: int, runtime: Runtime, lr: float = 2e-4, batch_size: int = 64
    ) -> None:
        self.data, self.seed, self.runtime = data, seed, runtime
        self.batch_size, self.lr = batch_size, lr
        shape = data.preprocessing
        with seeded(seed, "gan"):
            self.generator = Generator(shape, classes).to(runtime.device)
            self.judge = Discriminator(shape.channels, shape.size, classes).to(runtime.device)
        self.adams = {
            "generator": torch.optim.Adam(self.generator.parameters(), lr, betas=(0.5, 0.999)),
            "judge": torch.optim.Adam(self.judge.parameters(), lr, betas=(0.5, 0.999)),
        }
        self.images = torch.zeros(0, *shape_of(shape), dtype=torch.uint8)
        self.labels = torch.zeros(0, dtype=torch.int64)

    def learn(self, step: int) -> dict[str, float]:
        """Step `step` (from 0) of the GAN: the discriminator, then the generator."""
        ((real, labels),) = minibatches(
            self.data, self.batch_size, step + 1, derive(self.seed, "gan data"), self.runtime, first_step=step
        )
        noise = torch.randn(len(labels), NOISE, generator=generator(self.seed, "gan noise", step)).to(real.device)
        made = self.generator.train()(noise, labels)
        judged = self._step("judge", discriminator_loss(self.judge, real, labels, made))
        return {"judge": judged, "generator": self._step("generator", generator_loss(self.judge, made, labels))}

    def _step(self, name: str, loss: Tensor) -> float:
        self.adams[name].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.adams[name].step()
        return loss.item()

    def go(self, distance: float, direction: int, directions: int, steps: int, each: int) -> float:
        """Make a copy of the generator leave, and keep `each` images a class of it; returns their MMD to the domain."""
        stream = derive(self.seed, "leave", str(distance), direction)
        batches = minibatches(self.data, self.batch_size, steps, stream, self.runtime)
        rng = generator(stream, "noise")
        away = leave(self.generator, self.judge, batches, distance, direction, directions, self.lr, rng)
        images, labels = make_images(away, each, rng, self.data.preprocessing)
        self.images, self.labels = torch.cat([self.images, images]), torch.cat([self.labels, labels])
        return self._distance(images)

    @torch.no_grad()
    def _distance(self, images: Tensor) -> float:
        real, _ = self.data.batch(torch.arange(min(256, len(self.data))), self.runtime)
        made = self.data.preprocessing.normalise(images[:: max(1, len(images) // 256)].to(real.device))
        return mmd(self.judge.body(real), self.judge.body(made)).item()

    def result(self) -> ImageData:
        """The images made, as a domain's data."""
        device = self.data.images.device
        return replace(self.data, images=self.images.to(device), labels=self.labels.to(device))

    def state_dict(self) -> dict[str, Any]:
        """Both networks, their optimisers, the images."""
        parts = {"generator": self.generator, "judge": self.judge}
        return {
            **{n: m.state_dict() for n, m in parts.items()},
            **{f"{n} adam": a.state_dict() for n, a in self.adams.items()},
            "images": self.images,
            "labels": self.labels,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Back to a state."""
        self.generator.load_state_dict(state_dict["generator"])
        self.judge.load_state_dict(state_dict["judge"])
        for name, adam in self.adams.items():
            adam.load_state_dict(state_dict[f"{name} adam"])
        self.images, self.labels = state_dict["images"], state_dict["labels"]


def shape_of(preprocessing: Preprocessing) -> tuple[int, int, int]:
    """(channels, size, size)."""
    return preprocessing.channels, preprocessing.size, preprocessing.size
