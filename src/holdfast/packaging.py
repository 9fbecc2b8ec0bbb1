"""How a bundle is laid out so that the library its model comes from can load it: ours, timm's, or diffusers'."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from holdfast.diffusion.denoisers import UNETS, Denoiser
from holdfast.files import read_json, write_json
from holdfast.models import Architecture, State

WEIGHTS = "model.safetensors"
PIPELINE = "model_index.json"
UNET_FILE = "diffusion_pytorch_model.safetensors"
UNET_WEIGHTS = f"unet/{UNET_FILE}"
SCHEDULER = "scheduler_config.json"
PREFIX = "unet."


class Packaging(Protocol):
    """A layout. `weights`: where the weights lie in the folder; `library` and `tag`: for the model card."""

    weights: str
    library: str
    tag: str

    def named(self, state: Mapping[str, Any]) -> State:
        """The state dict with the names that the library gives its tensors."""
        ...

    def extras(self, folder: Path, architecture: Architecture, classes: int) -> None:
        """Write what the library needs beside weights and `config.json`."""
        ...

    def config(self, architecture: Architecture, classes: Sequence[str]) -> dict[str, Any]:
        """The library's own keys of `config.json`."""
        ...

    def usage(self, architecture: Architecture) -> list[str]:
        """Lines of Python that load the bundle."""
        ...


class _Plain:
    """Our own networks, and those that only their authors can build."""

    weights, library, tag = WEIGHTS, "holdfast", "image-classification"

    def named(self, state: Mapping[str, Any]) -> State:
        return dict(state)

    def extras(self, folder: Path, architecture: Architecture, classes: int) -> None:
        """Nothing."""

    def config(self, architecture: Architecture, classes: Sequence[str]) -> dict[str, Any]:
        """timm's keys too, so that one reader does for both."""
        arch = architecture
        mean, std = (list(v) * (arch.channels if len(v) == 1 else 1) for v in (arch.mean, arch.std))
        return {
            "num_classes": len(classes),
            "model_args": self._arguments(arch),
            "pretrained_cfg": {
                "num_classes": len(classes),
                "input_size": [arch.channels, arch.size, arch.size],
                "mean": mean,
                "std": std,
                "fixed_input_size": fixed_size(arch),
                "label_names": list(classes),
            },
        }

    def _arguments(self, arch: Architecture) -> dict[str, Any]:
        return {}

    def usage(self, architecture: Architecture) -> list[str]:
        return ["import holdfast", f'model = holdfast.load_model("bundle"{factory_argument(architecture)})']


class _Timm(_Plain):
    """`timm.create_model("local-dir:FOLDER")` loads it."""

    library = "timm"

    def _arguments(self, arch: Architecture) -> dict[str, Any]:
        size = {"img_size": arch.size} if fixed_size(arch) else {}  # a vision transformer needs it
        return {"in_chans": arch.channels, **size, **arch.options}

    def usage(self, architecture: Architecture) -> list[str]:
        return ["import timm", 'model = timm.create_model("local-dir:bundle", pretrained=True)']


class _Pipeline:
    """A pipeline folder of diffusers: `DiffusionPipeline.from_pretrained(FOLDER)` loads it. What the source pipeline
    holds beside U-Net and scheduler (a VAE, a text encoder) is copied as it is."""

    weights, library, tag = UNET_WEIGHTS, "diffusers", "unconditional-image-generation"

    def named(self, state: Mapping[str, Any]) -> State:
        return {n.removeprefix(PREFIX): v for n, v in state.items()}

    def extras(self, folder: Path, architecture: Architecture, classes: int) -> None:
        """The U-Net's configuration; the rest from the source pipeline, or else a `DDPMPipeline` around it."""
        model = architecture.build(classes)
        if not isinstance(model, Denoiser):
            raise TypeError(f"expected a Denoiser, got {type(model).__name__}")
        unet: Any = model.unet
        unet.save_config(folder / "unet")
        source = Path(str(architecture.options["source"])) if architecture.options.get("source") else None
        if source is None:
            model.scheduler.save_config(folder / "scheduler")
            index = {
                "_class_name": "DDPMPipeline",
                "_diffusers_version": unet.config["_diffusers_version"],
                "scheduler": ["diffusers", type(model.scheduler).__name__],
                "unet": ["diffusers", type(unet).__name__],
            }
            write_json(folder / PIPELINE, index)
        elif source.resolve() != folder.resolve():
            index = read_json(source / PIPELINE)
            for part in (n for n in index if n != "unet" and (source / n).is_dir()):
                shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
            if not (source / "scheduler").is_dir():  # beside the rest: it becomes a folder of its own
                (folder / "scheduler").mkdir(exist_ok=True)
                shutil.copy(source / SCHEDULER, folder / "scheduler" / SCHEDULER)
            write_json(folder / PIPELINE, index)

    def config(self, architecture: Architecture, classes: Sequence[str]) -> dict[str, Any]:
        return {}

    def usage(self, architecture: Architecture) -> list[str]:
        options = architecture.options
        if options.get("conditional") or options.get("unet", {}).get("num_class_embeds"):  # a DDPMPipeline tells none
            return [
                "import torch",
                "from diffusers import UNet2DModel",
                'unet = UNet2DModel.from_pretrained("bundle", subfolder="unet")',
                "noise = unet(noisy, timestep, class_labels=torch.tensor([0])).sample",
            ]
        return [
            "from diffusers import DiffusionPipeline",
            'pipeline = DiffusionPipeline.from_pretrained("bundle")',
            "images = pipeline(batch_size=4).images"
            if architecture.name == "unet2d"
            else 'images = pipeline("a prompt").images',
        ]


def packaging(architecture: Architecture) -> Packaging:
    """The layout for an architecture."""
    if architecture.name in UNETS and architecture.factory is None:
        return _Pipeline()
    return _Timm() if of_timm(architecture) else _Plain()


def find_weights(folder: Path) -> Path:
    """Where the weights lie in a bundle or a pipeline folder."""
    unet = unet_folder(folder) / UNET_FILE
    return unet if (folder / PIPELINE).is_file() and unet.is_file() else folder / WEIGHTS


def unet_folder(folder: Path) -> Path:
    """Where a pipeline's U-Net lies: in a folder of its own, or, as the first pipelines had it, beside the rest."""
    inner = folder / "unet"
    return inner if inner.is_dir() or not (folder / UNET_FILE).is_file() else folder


def our_names(state: Mapping[str, Any], architecture: Architecture) -> State:
    """The state dict with our names: a U-Net's tensors as those of the `Denoiser` around it."""
    foreign = architecture.name in UNETS and not any(n.startswith(PREFIX) for n in state)
    return {f"{PREFIX}{n}": v for n, v in state.items()} if foreign else dict(state)


def of_timm(architecture: Architecture) -> bool:
    """Whether timm can build it."""
    name = architecture.name
    if architecture.factory is not None or ":" in name or name in (*UNETS, "small_conv"):
        return False  # without timm, which takes seconds to import
    import timm

    return bool(timm.is_model(name))


def factory_argument(architecture: Architecture) -> str:
    """The argument that `load_model` needs for a network that only its author can build; else nothing."""
    arch = architecture
    known = arch.name in (*UNETS, "small_conv") or of_timm(arch)
    return "" if known else f", holdfast.Architecture({arch.name!r}, {arch.size}, {arch.channels}, factory=...)"


def fixed_size(architecture: Architecture) -> bool:
    """Whether timm builds the model for one input size."""
    if not of_timm(architecture):
        return False
    import timm

    config = timm.get_pretrained_cfg(architecture.name)
    return bool(config is not None and config.fixed_input_size)
