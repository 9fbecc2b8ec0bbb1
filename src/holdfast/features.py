"""What flows between a model's layers, caught while it runs."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.errors import UserError

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Hardswish, nn.ReLU6)


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


def last_activation(model: nn.Module, example: Tensor) -> tuple[str, str | None]:
    """Name of the last activation module that runs, and of the layer whose output is its very input (None where
    something lies between, as a residual sum does). Raises `UserError` for a model without activation modules."""
    inputs: dict[str, Tensor] = {}
    makers: dict[int, str] = {}
    order: list[str] = []
    alive: list[Tensor] = []  # so that no id is used twice

    def before(name: str, args: tuple[Any, ...]) -> None:
        inputs[name] = args[0]
        order.append(name)

    def after(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            makers[id(output)] = name
            alive.append(output)

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, ACTIVATIONS):
            hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: before(name, args)))
        elif not list(module.children()):
            hooks.append(module.register_forward_hook(lambda _, __, output, name=name: after(name, output)))
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    if not order:
        names = ", ".join(a.__name__ for a in ACTIVATIONS)
        raise UserError(f"the model runs no activation module (one of {names})")
    return order[-1], makers.get(id(inputs[order[-1]]))
