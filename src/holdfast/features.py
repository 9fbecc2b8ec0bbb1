"""What flows between a model's layers, caught while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.errors import UserError
from holdfast.layers import WEIGHT_LAYERS, evaluating, executed_layers, run_order

RECTIFIERS = (nn.ReLU, nn.ReLU6)


class Place:
    """A module of a model, or one of its runs: `layer1.0.relu#1` is the second of those within a forward pass, where
    one module serves several places."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name, _, run = name.partition("#")
        self.model, self.module, self.run = model, model.get_submodule(self.name), int(run) if run else None
        self._at = -1

    def hooks(
        self,
        before: Callable[[Tensor], Tensor | None] | None = None,
        after: Callable[[Tensor], None] | None = None,
    ) -> list[Any]:
        """Hooks that show `before` what goes in, to be replaced by what it returns, and `after` what comes out; in this
        run alone, where there is one."""

        def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            self._at += 1
            found = before(args[0]) if before is not None and self.run in (None, self._at) else None
            return None if found is None else (found, *args[1:])

        def leave(_: nn.Module, __: Any, output: Tensor) -> None:
            if after is not None and self.run in (None, self._at):
                after(output)

        def begin(*_: Any) -> None:
            self._at = -1

        made = [self.model.register_forward_pre_hook(begin)] if self.run is not None else []
        if before is not None or self.run is not None:
            made.append(self.module.register_forward_pre_hook(enter))
        return made if after is None else [*made, self.module.register_forward_hook(leave)]


class Tap:
    """Within `with Tap(model, place) as tap:`, `tap.value` is what last went into the place (or came out of it), with
    its gradient history; see `Place`. An activation that works in place does not spoil it."""

    def __init__(self, model: nn.Module, place: str, side: Literal["input", "output"] = "input") -> None:
        self.place, self.side = Place(model, place), side
        self._value: Tensor | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> Tap:
        self._hooks = self.place.hooks(**{"before" if self.side == "input" else "after": self._keep})
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, value: Tensor) -> None:
        self._value = value.clone() if getattr(self.place.module, "inplace", False) else value

    @property
    def value(self) -> Tensor:
        """The features, (n, …)."""
        if self._value is None:
            raise ValueError("the tapped layer has not run")
        return self._value


class Taps:
    """Within `with Taps(model, places) as taps:`, `taps.values` are what last went into each of them, in that order,
    with gradient history; see `Tap`."""

    def __init__(self, model: nn.Module, places: Sequence[str]) -> None:
        self._taps = [Tap(model, place) for place in places]

    def __enter__(self) -> Taps:
        for tap in self._taps:
            tap.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        for tap in self._taps:
            tap.__exit__(kind, value, at)

    @property
    def values(self) -> list[Tensor]:
        """Features of each layer, (n, …)."""
        return [tap.value for tap in self._taps]


# At and below which pre-activation a kind lets nothing through, or so little that it carries nothing: |gelu(−4)| is
# 1.3e-4, |silu(−10)| 4.5e-4. timm's own classes of the same names are found by them.
CLOSED: Mapping[str, float] = MappingProxyType(
    {"ReLU": 0.0, "ReLU6": 0.0, "StarReLU": 0.0, "GELU": -4.0, "GELUTanh": -4.0, "QuickGELU": -6.0, "SiLU": -10.0}
)


def activations(model: nn.Module, examples: Tensor) -> dict[str, bool]:
    """The places (`Place`) of the activation modules of `CLOSED`'s kinds, in the order in which they run on `examples`
    (n ≥ 2), and whether their channels lie on the last axis: what a linear layer gave them. A run whose input does not
    differ between examples is none, as that on the embedding of a timestep."""
    kinds = [n for n, m in model.named_modules() if type(m).__name__ in CLOSED]
    # StarReLU has a ReLU inside: the outer one is what can be closed.
    outer = {n for n in kinds if not any(n.startswith(f"{other}.") for other in kinds if other)}
    layers = {n for n, m in model.named_modules() if isinstance(m, WEIGHT_LAYERS)}
    runs = _runs(model, outer | layers, examples)
    counts = Counter(name for name, _ in runs)
    found, linear, at = {}, False, Counter[str]()
    for name, value in runs:
        if name in layers:
            linear = isinstance(model.get_submodule(name), nn.Linear)
            continue
        place = f"{name}#{at[name]}" if counts[name] > 1 else name
        at[name] += 1
        if len(value) == len(examples) and (value != value[:1]).any():
            found[place] = linear
    return found


def _runs(model: nn.Module, names: Collection[str], examples: Tensor) -> list[tuple[str, Tensor]]:
    """Every run of these modules, in order, with what went in."""
    found: list[tuple[str, Tensor]] = []
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, args, name=n: found.append((name, args[0].clone())))
        for n in names
    ]
    try:
        run_order(model, (), examples)  # which says in a line where a model does not run
    finally:
        for hook in hooks:
            hook.remove()
    return found


def depths(model: nn.Module, examples: Tensor) -> list[str]:
    """Names of the weight layers, but the first, whose input differs between `examples` (n ≥ 2), in the order in which
    they run: the places where information about an image may be found. What depends on something else alone, such as
    the embedding of a timestep, is none."""
    layers = [n for n in executed_layers(model, examples) if isinstance(model.get_submodule(n), WEIGHT_LAYERS)]
    with torch.no_grad(), evaluating(model), Taps(model, layers) as taps:
        model(examples)
    return [
        n for n, v in zip(layers[1:], taps.values[1:], strict=True) if len(v) == len(examples) and (v != v[:1]).any()
    ]


def closed_at(model: nn.Module, activation: str) -> float:
    """The pre-activation at which the activation of this place is closed; see `CLOSED`."""
    return CLOSED[type(Place(model, activation).module).__name__]


def rectified(model: nn.Module, example: Tensor) -> list[tuple[str, str | None]]:
    """The ReLU modules in the order in which they run; with each the module whose output itself is its input (None
    where something lies between, as a residual sum does)."""
    # The tensors are kept, so that no two share an id; their versions tell whether something was added in place.
    made: dict[int, tuple[Tensor, int, str]] = {}
    found: list[tuple[str, str | None]] = []

    def before(name: str, value: Tensor) -> None:
        known = made.get(id(value))
        found.append((name, known[2] if known and known[1] == value._version else None))

    def after(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            first = made.get(id(output))  # dropout hands on what it gets: the layer before it made the tensor
            made[id(output)] = (output, output._version, first[2] if first and first[1] == output._version else name)

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, RECTIFIERS):
            hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: before(name, args[0])))
        elif not list(module.children()):
            hooks.append(module.register_forward_hook(lambda _, __, output, name=name: after(name, output)))
    try:
        with torch.no_grad(), evaluating(model):
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def last_rectifier(model: nn.Module, example: Tensor) -> tuple[str, str | None]:
    """The last of `rectified`. Raises `UserError` for a model that runs no ReLU module."""
    found = rectified(model, example)
    if not found:
        raise UserError(f"the model runs no {' or '.join(r.__name__ for r in RECTIFIERS)} module")
    return found[-1]


def silences(model: nn.Module, rectifier: str, head: str, example: Tensor) -> bool:
    """Whether the head sees zeros alone where every pre-activation of this ReLU is negative: nothing passes it by."""
    hook = model.get_submodule(rectifier).register_forward_pre_hook(lambda _, args: (torch.full_like(args[0], -1.0),))
    try:
        with torch.no_grad(), evaluating(model), Tap(model, head) as tap:
            model(example)
    finally:
        hook.remove()
    return not bool(tap.value.any())
