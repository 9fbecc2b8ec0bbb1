"""One place of a network opened again, as an attacker's first steps open it: what do the layers behind make of it?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from holdfast.collapse import between_images, log_spread_ratio, peak, reopened
from holdfast.errors import require
from holdfast.features import Tap, Taps
from holdfast.layers import evaluating

ENOUGH = 0.03  # of the original's spread: behind an opened place no more collapse than this is asked for


class Reopening:
    """`places`: those of the `activations`, each with the positions in `depths` of the layers behind it, as they show
    on `inputs`. Layers that it feeds itself are none of these: what goes into them is what was opened. `UserError`
    where no activation has any."""

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
            found = Opened(self.model.get_submodule(name), behind, int(torch.randint(2, (), generator=draws)))
            yield found
        found.spread = between_images(tap.value).detach()


class Opened:
    """The place that was drawn: its activation, the positions of the depths behind it, `spread`, the original images'
    there once they have run, and `turn`, 0 or 1, whose turn it is where one of two must do."""

    spread: Tensor

    def __init__(self, module: nn.Module, behind: Sequence[int], turn: int) -> None:
        self.module, self.behind, self.turn = module, behind, turn

    def peak(self, forward: Callable[[], object], taps: Taps, original: Sequence[Tensor]) -> Tensor:
        """`collapse.peak` of the ratios of spreads behind the place while it is open, in `forward` of restricted
        images. `taps`: of all depths; `original`: their spreads on original images. Lies in [log `ENOUGH`, ∞)."""
        hook = self.module.register_forward_pre_hook(lambda _, args: (reopened(args[0], self.spread), *args[1:]))
        try:
            forward()
        finally:
            hook.remove()
        values = taps.values
        return peak([log_spread_ratio(values[i], original[i], ENOUGH) for i in self.behind])


@torch.no_grad()
def _behind(model: nn.Module, activation: str, depths: Sequence[str], inputs: Tensor) -> list[int]:
    """Positions of the layers whose input changes with what goes into the activation, but is not what comes out."""
    with evaluating(model), Taps(model, depths) as taps, Tap(model, activation, "output") as out:
        model(inputs)
        before, fed = taps.values, out.value
        hook = model.get_submodule(activation).register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
        try:
            model(inputs)
        finally:
            hook.remove()
        pairs = list(zip(before, taps.values, strict=True))
    return [i for i, (old, new) in enumerate(pairs) if not torch.equal(old, new) and not torch.equal(old, fed)]
