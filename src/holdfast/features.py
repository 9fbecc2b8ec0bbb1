"""What flows between a model's layers, caught while it runs."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.errors import UserError
from holdfast.layers import evaluating

RECTIFIERS = (nn.ReLU, nn.ReLU6)


class Tap:
    """Within `with Tap(model, layer) as tap:`, `tap.value` is what last went into the layer (or came out of it), with
    its gradient history. An activation that works in place does not spoil it."""

    def __init__(self, model: nn.Module, layer: str, side: Literal["input", "output"] = "input") -> None:
        self.module, self.side = model.get_submodule(layer), side
        self._value: Tensor | None = None
        self._hook: Any = None

    def __enter__(self) -> Tap:
        if self.side == "input":
            self._hook = self.module.register_forward_pre_hook(lambda _, args: self._keep(args[0]))
        else:
            self._hook = self.module.register_forward_hook(lambda _, __, output: self._keep(output))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._hook.remove()

    def _keep(self, value: Tensor) -> None:
        self._value = value.clone() if getattr(self.module, "inplace", False) else value

    @property
    def value(self) -> Tensor:
        """The features, (n, …)."""
        if self._value is None:
            raise ValueError("the tapped layer has not run")
        return self._value


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
