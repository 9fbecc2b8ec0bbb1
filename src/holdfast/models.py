"""Models by name: our small network, any of timm, a U-Net of diffusers, or a user's own factory; and their weights."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from holdfast.diffusion.denoisers import UNETS, build_denoiser
from holdfast.errors import UserError, one_line, require
from holdfast.files import load_torch, write_atomic
from holdfast.layers import find_head
from holdfast.preprocessing import Preprocessing
from holdfast.seeding import seeded
from holdfast.sharding import assign, fits, own, whole

State = dict[str, Tensor]
Factory = Callable[[int], nn.Module]


class SmallConvNet(nn.Sequential):
    """Four 3×3 convolutions, batch normalisation and ReLU each, mean pooling, a linear head: for work on a CPU.

    `width` channels, then 2·width; strides (s, 2, 1, 2) with s = `stem_stride`. 94 k parameters at width 32.
    `hidden`: a linear layer of so many units, and its ReLU, before the head. `norm`: whether to normalise.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        width: int = 32,
        stem_stride: int = 1,
        norm: bool = True,
        hidden: int | None = None,
    ) -> None:
        plan = ((channels, width, stem_stride), (width, 2 * width, 2), (2 * width, 2 * width, 1))
        layers: list[nn.Module] = []
        for inputs, outputs, stride in (*plan, (2 * width, 2 * width, 2)):
            layers.append(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(outputs)] if norm else []
            layers.append(nn.ReLU(inplace=True))
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        layers += [nn.Linear(2 * width, hidden), nn.ReLU(inplace=True)] if hidden else []
        super().__init__(*layers, nn.Linear(hidden or 2 * width, classes))


@dataclass(frozen=True)
class Architecture:
    """How to build a model anew, and the input it takes.

    `name`: `small_conv`, any timm model, `unet2d` or `unet2d_condition` (see `diffusion/denoisers.py`), or
    `module:factory` for your own (`factory(classes) -> nn.Module`; it must be importable). `options` go to the
    constructor. From Python, `factory` takes a callable directly.
    """

    name: str = "small_conv"
    size: int = 32
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    options: Mapping[str, Any] = field(default_factory=dict)
    factory: Factory | None = None
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "arbitrary_types_allowed": True}

    def __post_init__(self) -> None:
        _ = self.preprocessing  # raises for a size, channels, mean or std out of range

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are made to fit."""
        return Preprocessing(self.size, self.channels, tuple(self.mean), tuple(self.std))

    def example(self, batch: int = 1) -> Tensor:
        """Zeros of the input's shape, (batch, channels, size, size); for a latent U-Net, of its latents."""
        latents = self.options.get("unet", {}) if self.name in UNETS else {}
        size = latents.get("sample_size") or self.size
        return torch.zeros(batch, latents.get("in_channels", self.channels), size, size)

    def build(self, classes: int, seed: int = 0, pretrained: bool = False) -> nn.Module:
        """A freshly initialised model with `classes` outputs. `pretrained`: with timm's published weights."""
        with seeded(seed, "build"):
            try:
                return self.construct(classes, pretrained)
            except UserError:
                raise
            except Exception as error:  # constructors raise whatever they like on options they cannot take
                raise UserError(f"cannot build model '{self.name}': {one_line(error, 200)}") from error

    def construct(self, classes: int, pretrained: bool = False) -> nn.Module:
        """As `build`, with whatever torch's generators draw; for factories that `build` calls."""
        factory = self.factory or (import_factory(self.name) if ":" in self.name else None)
        if factory is not None or self.name in (*UNETS, "small_conv"):
            require(not pretrained, f"'{self.name}' has no published weights; give a file, or pre-train it")
            if factory is not None:
                return factory(classes)
            if self.name in UNETS:
                return build_denoiser(self.name, self.options, self.size, self.channels, classes)
            return SmallConvNet(classes, self.channels, **self.options)
        import timm

        if not timm.is_model(self.name):
            near = difflib.get_close_matches(self.name, ["small_conv", *UNETS, *timm.list_models()], n=3)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise UserError(f"unknown model '{self.name}'{hint}; `holdfast list models` names all")
        arguments: dict[str, Any] = {"num_classes": classes, "in_chans": self.channels, "pretrained": pretrained}
        config = timm.get_pretrained_cfg(self.name)
        if config is not None and config.fixed_input_size:  # vision transformers and their like
            arguments["img_size"] = self.size
        model = timm.create_model(self.name, **{**arguments, **self.options})
        if not isinstance(model, nn.Module):
            raise UserError(f"timm returned no module for '{self.name}'")
        return model

    def head(self, model: nn.Module, classes: int) -> list[str]:
        """Names of the head's layers; see `holdfast.layers.find_head`."""
        device = next(model.parameters()).device
        return find_head(model, classes, self.example().to(device))


def import_factory(name: str) -> Factory:
    """The callable behind `package.module:factory`. Only for names that the user gave; never for a bundle's."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot import '{name}': {one_line(error)} (expected module:function)") from error
    require(callable(found), f"model factory '{name}' is not callable")
    return found  # type: ignore[no-any-return]


def state_of(model: nn.Module) -> State:
    """A copy of the model's parameters and buffers, on the CPU; of a sharded model they are put together, by all."""
    return {name: whole(value.detach()).cpu().clone() for name, value in model.state_dict().items()}


def parts_of_state(model: nn.Module) -> State:
    """A copy of what this process has of the model's parameters and buffers, on the CPU; all, unless it is sharded."""
    return {name: own(value.detach()).cpu().clone() for name, value in model.state_dict().items()}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `model`, in place. Raises `UserError` where names or shapes do not fit."""
    there = model.state_dict()
    missing, extra = sorted(there.keys() - state.keys()), sorted(state.keys() - there.keys())
    require(
        not missing and not extra,
        f"weights do not fit the model: {len(missing)} missing ({', '.join(missing[:2])}), "
        f"{len(extra)} unknown ({', '.join(extra[:2])})",
    )
    wrong = [n for n in there if not fits(there[n], state[n])]
    if wrong:
        name = wrong[-1]
        raise UserError(
            f"weights do not fit the model: '{name}' is {tuple(state[name].shape)} in the file, but "
            f"{tuple(there[name].shape)} in the model (does the number of classes agree?)"
        )
    with torch.no_grad():
        for name, value in there.items():
            assign(value, state[name])


def load_weights(path: str | Path) -> State:
    """Weights from `.safetensors`, or from a state dict that `torch.load(weights_only=True)` accepts.

    `path` may be a bundle's folder (`bundle.read_weights` checks that it is whole). The wrappers `state_dict`, `model`,
    `model_state_dict` and the prefix `module.` are taken off. No code in the file is ever run. Raises `UserError` for a
    file that is missing, truncated or holds anything but tensors.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "model.safetensors"
    require(file.is_file(), f"weights not found: {file}")
    if file.suffix == ".safetensors":
        try:
            return dict(safetensors.torch.load_file(file))
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"cannot read {file}: truncated, or not safetensors ({one_line(error, 120)})") from error
    found = load_torch(file)
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    require(
        isinstance(found, dict) and bool(found) and all(isinstance(v, Tensor) for v in found.values()),
        f"{file} holds no state dict (expected a mapping from names to tensors)",
    )
    return {name.removeprefix("module."): value for name, value in found.items()}


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write safetensors, atomically. Tensors that share memory are written apart."""
    apart = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    write_atomic(path, safetensors.torch.save(apart))


def with_pretrained_normalisation(architecture: Architecture) -> Architecture:
    """The architecture with the mean and deviation that timm's published weights were trained with."""
    import timm

    config = timm.get_pretrained_cfg(architecture.name)
    if config is None or architecture.channels != 3:
        return architecture
    return replace(architecture, mean=tuple(config.mean), std=tuple(config.std))
