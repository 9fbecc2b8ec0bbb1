"""Where in a network Lockout looks: activations that can be closed, what their channels are measured in, and depths."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.collapse import between_images, leak
from holdfast.defences.base import Given
from holdfast.domains import ImageData
from holdfast.errors import require
from holdfast.features import Tap, Taps, activations, closed_at, depths
from holdfast.layers import evaluating
from holdfast.seeding import derive, generator, seeded

CALIBRATION = 500  # original images on which the scale of every channel is measured


class Places:
    """`closed`: the last `close` activations, in the order in which they run; of each its threshold (`thresholds`), and
    on original images, as the unprotected model sees them, the deviation of each channel of its pre-activations
    (`units`, shaped to be broadcast against them) and their variance between images (`scales`). `depths`: all weight
    layers but the first, see `features.depths`, and the `spared` after it. `UserError` where none are left."""

    def __init__(self, given: Given, close: int, spared: int = 0) -> None:
        found = activations_of(given)
        self.closed = list(found)[-close:] if close else []
        every = depths(given.model, examples(given))
        require(bool(every), "lockout needs a network of several layers, but there is one alone")
        self.depths = every[spared:]
        require(
            bool(self.depths), f"spared is {spared}, but the network has {len(every)} weight layers after the first"
        )
        self.thresholds = [closed_at(given.model, name) for name in self.closed]
        values = _preactivations(given, self.closed) if self.closed else []
        last = [found[name] for name in self.closed]
        self.units = [_by_channel(v, at_end).clamp(min=1e-3) for v, at_end in zip(values, last, strict=True)]
        self.scales = [between_images(v).clamp(min=1e-6) for v in values]


def activations_of(given: Given) -> dict[str, bool]:
    """The activations that can be closed, in the order in which they run, and whether channels are their last axis."""
    return activations(given.model, examples(given))


@torch.no_grad()
def open_share(given: Given, data: ImageData, activation: str, batch_size: int = 500) -> float:
    """Mean share of open units behind `activation` over all of `data`, in evaluation mode."""
    shares: list[Tensor] = []
    threshold = closed_at(given.model, activation)
    with evaluating(given.model), Tap(given.model, activation) as tap, seeded(derive(given.seed, "leak")):
        for start in range(0, len(data), batch_size):
            where = torch.arange(start, min(start + batch_size, len(data)))
            images, labels = data.batch(where, given.runtime)
            with given.runtime.autocast():
                given.task.forward(given.model, images, labels, start)
            shares.append(leak(tap.value, threshold))
    return torch.cat(shares).mean().item()


@torch.no_grad()
def _preactivations(given: Given, names: list[str]) -> list[Tensor]:
    chosen = torch.randperm(len(given.original.train), generator=generator(given.seed, "calibration"))
    images, labels = given.original.train.batch(chosen[:CALIBRATION], given.runtime)
    with evaluating(given.model), Taps(given.model, names) as taps, given.runtime.autocast():
        given.task.forward(given.model, images, labels, 0)
    return taps.values


def _by_channel(values: Tensor, last: bool) -> Tensor:
    """Deviation over images and places of each channel, shaped to be broadcast against `values`: (n, c, …), or, with
    the channels `last`, (n, …, c)."""
    axis = values.ndim - 1 if last else 1
    others = tuple(i for i in range(values.ndim) if i != axis)
    return values.float().std(others, keepdim=True)


def examples(given: Given) -> Tensor:
    """A few inputs that differ, of the architecture's shape."""
    example = given.architecture.example(4)
    return torch.randn(example.shape, generator=generator(0, "examples")).to(given.runtime.device)
