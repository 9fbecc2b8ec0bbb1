"""Low-rank adapters (LoRA, Hu et al., ICLR 2022) by peft, on linear layers and convolutions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec

from torch import nn

from holdfast.errors import UserError, require


def adaptable_layers(model: nn.Module, rank: int, head: Sequence[str]) -> list[str]:
    """Names of the linear layers and convolutions that take an adapter of this rank; the head is trained whole."""
    found = []
    for name, module in model.named_modules():
        grouped = isinstance(module, nn.Conv2d) and module.groups > 1 and rank % module.groups
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in head and not grouped:
            found.append(name)
    return found


def check_adapters(model: nn.Module, rank: int, head: Sequence[str]) -> list[str]:
    """The layers that take an adapter; `UserError` where peft is not installed or there is none."""
    if find_spec("peft") is None:
        raise UserError("LoRA attacks need peft: pip install 'holdfast[lora]'")
    layers = adaptable_layers(model, rank, head)
    require(bool(layers), f"the model has no linear layer or convolution that takes an adapter of rank {rank}")
    return layers


def without_adapters(name: str) -> str | None:
    """The name that a parameter had before adapters were added; None for one of theirs."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def add_adapters(model: nn.Module, rank: int, head: Sequence[str], alpha: float = 2.0) -> list[nn.Parameter]:
    """Add W + (alpha)·B·A to every adaptable layer of `model`, in place, A at random and B zero, so the function is
    as before; return the new parameters. `alpha`: the scale α/r of the paper.

    Raises `UserError` where peft is not installed or the model has no such layer.
    """
    layers = check_adapters(model, rank, head)
    from peft import LoraConfig, inject_adapter_in_model

    device = next(model.parameters()).device
    known = {id(p) for p in model.parameters()}
    exactly = "|".join(map(re.escape, layers))  # a list would match every name that ends like one of these
    config = LoraConfig(r=rank, lora_alpha=round(alpha * rank), target_modules=exactly, lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    model.to(device)
    return [p for p in model.parameters() if id(p) not in known]
