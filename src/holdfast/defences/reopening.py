"""One place of a network opened again, as an attacker's first steps open it: what do the layers behind make of it?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.collapse import between_images, log_spread_ratio, peak, reopened
from holdfast.errors import require
from holdfast.features import Place, Tap, Taps
from holdfast.layers import WEIGHT_LAYERS, evaluating

ENOUGH = 0.03  # of the original's spread: behind an opened place no more collapse than this is asked for


class Reopening:
    """`places`: those of the `activations`, each with the positions in `depths` of the layers behind it, as they show
    on `inputs`. Layers that it feeds without a weight layer between, by itself, pooled or in a sum, are none of these:
    what goes into them is what was opened. `UserError` where no activation has any."""

    def __init__(self, model: nn.Module, activations: Sequence[str], depths: Sequence[str], inputs: Tensor) -> None:
        self.model = model
        found = ((name, _behind(model, name, depths, inputs)) for name in activations)
        self.places = [(name, behind) for name, behind in found if behind]
        require(bool(self.places), "reopen is above 0, but behind no activation module of the network lies a depth")

    @contextmanager
    def watching(self, draws: torch.Generator) -> Iterator[Opened]:
        """One place, drawn by `draws`; what runs within says how far it is opened afterwards."""
        name, behind = self.places[int(torch.randint(len(self.places), (), generator=draws))]
        with Tap(self.model, name) as tap:
            found = Opened(Place(self.model, name), behind, int(torch.randint(2, (), generator=draws)))
            yield found
        found.spread = between_images(tap.value).detach()


class Opened:
    """The place that was drawn: its activation, the positions of the depths behind it, `spread`, the original images'
    there once they have run, and `turn`, 0 or 1, whose turn it is where one of two must do."""

    spread: Tensor

    def __init__(self, place: Place, behind: Sequence[int], turn: int) -> None:
        self.place, self.behind, self.turn = place, behind, turn

    def peak(self, forward: Callable[[], object], taps: Taps, original: Sequence[Tensor]) -> Tensor:
        """`collapse.peak` of the ratios of spreads behind the place while it is open, in `forward` of restricted
        images. `taps`: of all depths; `original`: their spreads on original images. Lies in [log `ENOUGH`, ∞)."""
        with altered(self.place, lambda x: reopened(x, self.spread)):
            forward()
        values = taps.values
        return peak([log_spread_ratio(values[i], original[i], ENOUGH) for i in self.behind])


@contextmanager
def altered(place: Place, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, what goes into the place is `change` of it."""
    hooks = place.hooks(change)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _behind(model: nn.Module, activation: str, depths: Sequence[str], inputs: Tensor) -> list[int]:
    """Positions of the layers whose input changes with what goes into the activation, and otherwise than if all weight
    layers gave what they gave before."""
    with evaluating(model), Taps(model, depths) as taps:
        with _outputs(model) as outputs:
            model(inputs)
        before = taps.values
        with altered(Place(model, activation), lambda x: x + 1):
            model(inputs)
            changed = taps.values
            with _outputs(model, outputs):
                model(inputs)
        direct = taps.values
    found = enumerate(zip(before, changed, direct, strict=True))
    return [i for i, (b, c, d) in found if not torch.equal(b, c) and not torch.equal(c, d)]


@contextmanager
def _outputs(model: nn.Module, given: Sequence[Tensor] | None = None) -> Iterator[list[Tensor]]:
    """What the weight layers give within, run by run; where outputs are `given`, that is what they give."""
    found: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        found.append(output.clone() if given is None else given[len(found)].clone())
        return found[-1]

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, WEIGHT_LAYERS)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
