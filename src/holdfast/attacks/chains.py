"""Which layers follow each other so directly that one may be scaled and the other scaled back. Found by trying."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.layers import WEIGHT_LAYERS, executed_layers

TOLERANCE = 1e-3  # relative to the largest output


@dataclass(frozen=True)
class Link:
    """Two layers of which the first's output channels may be scaled by s > 0, each by its own, if the second's inputs
    are scaled back, the function staying as it is. `statistics`: the second is a batch normalisation, whose running
    statistics follow instead of its weights."""

    first: str
    second: str
    statistics: bool

    def channels(self, model: nn.Module) -> int:
        """Output channels of the first layer."""
        return len(weight_of(model, self.first))

    @torch.no_grad()
    def scale(self, model: nn.Module, factors: Tensor) -> None:
        """Scale in place; `factors` (channels,)."""
        first, second = model.get_submodule(self.first), model.get_submodule(self.second)
        for tensor in (first.weight, first.bias):
            if isinstance(tensor, Tensor):
                tensor.mul_(_along(factors, tensor, 0))
        if self.statistics and isinstance(second, _BatchNorm):
            if second.running_mean is not None and second.running_var is not None:
                second.running_mean.mul_(factors)
                second.running_var.mul_(factors**2)
        else:
            weight = weight_of(model, self.second)
            weight.div_(_along(self._inputs(weight, factors), weight, self._axis(weight)))

    def sizes(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Root-mean-square weight of each channel of the first layer, and of what the second reads of it."""
        first, second = weight_of(model, self.first), weight_of(model, self.second)
        own = first.flatten(1) if first.ndim > 1 else first[:, None]
        if self.statistics:
            return _rms(own), torch.ones(len(own)).to(own)
        reads = second.movedim(self._axis(second), 0).reshape(len(own), -1)
        return _rms(own), _rms(reads)

    def _axis(self, weight: Tensor) -> int:
        return 0 if weight.ndim > 2 and weight.shape[1] == 1 else 1  # a depthwise convolution reads its own channel

    def _inputs(self, weight: Tensor, factors: Tensor) -> Tensor:
        """One factor for each input; a linear layer behind a flattened map has several a channel."""
        return factors.repeat_interleave(weight.shape[self._axis(weight)] // len(factors))

    def fits(self, model: nn.Module) -> bool:
        """Whether shapes allow it at all."""
        second = weight_of(model, self.second)
        width = len(second) if self.statistics else second.shape[self._axis(second)]
        return width % self.channels(model) == 0


def weight_of(model: nn.Module, layer: str) -> Tensor:
    """A layer's weight, without its gradient."""
    found = model.get_submodule(layer).weight
    if not isinstance(found, Tensor):
        raise TypeError(f"{layer} has no weight")
    return found.detach()


def _along(factors: Tensor, tensor: Tensor, axis: int) -> Tensor:
    return factors.view([-1 if i == axis else 1 for i in range(tensor.ndim)])


def _rms(rows: Tensor) -> Tensor:
    return rows.float().square().mean(1).sqrt()


def links(model: nn.Module, inputs: Tensor) -> list[Link]:
    """All links of `model`, in the order in which its layers run on `inputs`.

    A pair is a link where scaling its channels by 2 or ½ leaves the outputs as they are on `inputs` and on noise: so
    skip connections, smooth activations and layer normalisations drop out by themselves. Weights are as before; the
    model is in evaluation mode.
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
            if link.fits(model) and _preserves(model, link, probes):
                found.append(link)
                break
    return found


def _scalable(module: nn.Module) -> bool:
    return isinstance(module, (*WEIGHT_LAYERS, _BatchNorm)) and isinstance(module.weight, Tensor)


def _preserves(model: nn.Module, link: Link, probes: tuple[Tensor, ...]) -> bool:
    """Whether scaling by random 2s and ½s, and by their inverses, keeps the outputs on all probes."""
    before = [outputs(model, p) for p in probes]
    kept = {n: v.clone() for n, v in model.state_dict().items()}
    count = link.channels(model)
    signs = torch.randint(2, (count,), generator=torch.Generator().manual_seed(count)) * 2 - 1
    same = True
    for sign in (1, -1):
        link.scale(model, (2.0 ** (sign * signs)).to(probes[0]))
        same = same and all(close(outputs(model, p), b) for p, b in zip(probes, before, strict=True))
        model.load_state_dict(kept)
    return same


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's outputs in evaluation mode, where it stays, as float32."""
    found: Tensor = model.eval()(inputs).float()
    return found


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two outputs differ by no more than `TOLERANCE` of the largest."""
    scale = theirs.abs().max().clamp_min(1e-12)
    return bool(((ours - theirs).abs().max() / scale) < TOLERANCE)
