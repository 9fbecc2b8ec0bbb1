"""Which layers follow each other so directly that one may be scaled and the other scaled back. Found by trying."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.layers import WEIGHT_LAYERS, executed_layers

TOLERANCE = 1e-3  # relative to the largest output


@dataclass(frozen=True)
class Link:
    """Two layers of which the first may be scaled by s > 0 if the second is scaled back, the function staying as it
    is. `statistics`: the second is a batch normalisation, whose running statistics follow instead of its weights."""

    first: str
    second: str
    statistics: bool

    def scale(self, model: nn.Module, factor: float) -> None:
        """Scale in place."""
        first, second = model.get_submodule(self.first), model.get_submodule(self.second)
        with torch.no_grad():
            for tensor in (first.weight, first.bias):
                if isinstance(tensor, Tensor):
                    tensor.mul_(factor)
            if self.statistics and isinstance(second, _BatchNorm):
                if second.running_mean is not None and second.running_var is not None:
                    second.running_mean.mul_(factor)
                    second.running_var.mul_(factor**2)
            elif isinstance(second.weight, Tensor):
                second.weight.div_(factor)


def links(model: nn.Module, inputs: Tensor) -> list[Link]:
    """All links of `model`, in the order in which its layers run on `inputs`.

    A pair is a link where scaling it by 2 and by ½ leaves the outputs as they are on `inputs` and on noise: so skip
    connections, smooth activations and layer normalisations drop out by themselves. Weights are as before; the model
    is in evaluation mode.
    """
    order = [n for n in executed_layers(model, inputs[:1]) if _scalable(model.get_submodule(n))]
    probes = (inputs, torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0)).to(inputs))
    found = []
    for i, first in enumerate(order):
        for second in order[i + 1 : i + 3]:  # its own normalisation, and the layer behind that
            normalised = isinstance(model.get_submodule(second), _BatchNorm)
            if isinstance(model.get_submodule(first), _BatchNorm) and normalised:
                continue
            link = Link(first, second, normalised)
            if preserves(model, link.scale, probes):
                found.append(link)
                break
    return found


def _scalable(module: nn.Module) -> bool:
    return isinstance(module, (*WEIGHT_LAYERS, _BatchNorm)) and isinstance(module.weight, Tensor)


def preserves(
    model: nn.Module, scale: Callable[[nn.Module, float], None], probes: tuple[Tensor, ...], factor: float = 2.0
) -> bool:
    """Whether scaling by `factor` and by its inverse keeps the outputs on all `probes`; `model` is put back."""
    before = [_outputs(model, p) for p in probes]
    same = True
    kept = {n: v.clone() for n, v in model.state_dict().items()}
    for s in (factor, 1 / factor):
        scale(model, s)
        same = same and all(_close(_outputs(model, p), b) for p, b in zip(probes, before, strict=True))
        model.load_state_dict(kept)
    return same


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    found: Tensor = model.eval()(inputs).float()
    return found


def _close(ours: Tensor, theirs: Tensor) -> bool:
    scale = theirs.abs().max().clamp_min(1e-12)
    return bool(((ours - theirs).abs().max() / scale) < TOLERANCE)
