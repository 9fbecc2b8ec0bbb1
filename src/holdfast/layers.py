"""Find a classifier's head and its last layers by running it, not by knowing its name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from holdfast.errors import UserError, require
from holdfast.sharding import assign

WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode that it was in."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def run_order(model: nn.Module, names: Collection[str], example: Tensor) -> list[str]:
    """Those of the modules that ran on `example`, in the order of their (last) run.

    The model is run once in evaluation mode, without gradients; its buffers and mode are as before.
    """
    order: list[str] = []

    def note(name: str) -> None:
        if name in order:
            order.remove(name)
        order.append(name)

    hooks = [model.get_submodule(n).register_forward_hook(lambda *_, name=n: note(name)) for n in names]
    try:
        with torch.no_grad(), evaluating(model):
            model(example)
    except Exception as error:  # whatever a user's model raises on its own input shape
        raise UserError(
            f"the model does not run on an input of shape {tuple(example.shape)}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:160]}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return order


def executed_layers(model: nn.Module, example: Tensor) -> list[str]:
    """Names of the modules that own parameters themselves and ran on `example`; see `run_order`."""
    owners = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters(recurse=False))]
    return run_order(model, owners, example)


def find_head(model: nn.Module, classes: int, example: Tensor) -> list[str]:
    """Names of the module(s) that depend on the classes: those that make the logits; none for a model without classes.

    What the model itself says by a method `head_layers`; else the last linear layer or convolution that ran; where
    timm's `get_classifier` names several (a distilled ViT has two), all of them. Raises `UserError` where it does not
    have `classes` outputs.
    """
    names = {id(m): n for n, m in model.named_modules()}
    heads = [names[id(m)] for m in _declared_heads(model) if id(m) in names]
    own = getattr(model, "head_layers", None)
    if callable(own):
        heads = own()
    elif len(heads) < 2:
        ran = [n for n in executed_layers(model, example) if isinstance(model.get_submodule(n), WEIGHT_LAYERS)]
        require(bool(ran), "no head found: the model has no linear layer or convolution")
        heads = ran[-1:]
    for name in heads:
        outputs = _weight(model.get_submodule(name)).shape[0]
        require(
            outputs == classes,
            f"head and classes do not agree: the model's last layer '{name}' has {outputs} outputs, "
            f"but the domain has {classes} classes",
        )
    return heads


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise UserError(f"{type(layer).__name__} has no weight tensor")
    return weight


def _declared_heads(model: nn.Module) -> Iterator[nn.Module]:
    get = getattr(model, "get_classifier", None)
    found = get() if callable(get) else ()
    for module in found if isinstance(found, tuple | list | nn.ModuleList) else (found,):
        if isinstance(module, WEIGHT_LAYERS):
            yield module


def last_layers(model: nn.Module, k: int, example: Tensor) -> list[str]:
    """Names of the last `k` weight layers (head included), and of the normalisations and the like that ran after the
    first of them."""
    order = executed_layers(model, example)
    weights = [i for i, n in enumerate(order) if isinstance(model.get_submodule(n), WEIGHT_LAYERS)]
    require(1 <= k <= len(weights), f"last-k needs k in [1, {len(weights)}] for this model, but got {k}")
    return order[weights[-k] :]


def owned_tensors(model: nn.Module, layer: str) -> list[str]:
    """Names in the state dict of the parameters and buffers that a layer owns itself, not through a child."""
    module = model.get_submodule(layer)
    owned = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    saved = model.state_dict().keys()
    return [f"{layer}.{name}" for name, _ in owned if f"{layer}.{name}" in saved]


def initialise_head(layer: nn.Module, rng: torch.Generator) -> None:
    """Xavier-uniform weight and zero bias, as SOPHON's published code re-initialises it; same draw on any device."""
    weight, bias = _weight(layer), getattr(layer, "bias", None)
    with torch.no_grad():
        fresh = torch.empty(weight.shape, dtype=torch.float32)
        nn.init.xavier_uniform_(fresh.flatten(1), generator=rng)
        assign(weight, fresh)
        if isinstance(bias, Tensor):
            bias.zero_()
