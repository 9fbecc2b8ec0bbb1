"""Any checkpoint of diffusers: a pipeline folder, or a name on the Hub, as an `Architecture`; images as its latents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.diffusion.denoisers import UNETS, import_diffusers
from holdfast.domains import Domain, ImageData
from holdfast.errors import UserError, one_line, require
from holdfast.files import read_json
from holdfast.models import Architecture
from holdfast.packaging import unet_folder
from holdfast.preprocessing import Preprocessing
from holdfast.runtime import Runtime

SCHEME = "diffusers:"


def is_checkpoint(architecture: Architecture) -> bool:
    """Whether the architecture is still the name of a checkpoint, `diffusers:FOLDER` or `diffusers:HUB/NAME`."""
    return architecture.name.startswith(SCHEME)


@lru_cache
def pipeline_folder(name: str) -> Path:
    """The folder of a pipeline; one of the Hub is downloaded into diffusers' own cache, safetensors alone."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        require((folder / "model_index.json").is_file(), f"{folder} is no pipeline of diffusers (no model_index.json)")
        return folder.resolve()
    require("/" in name and not name.startswith(("/", ".", "~")), f"pipeline not found: {name}")
    try:
        return Path(import_diffusers().DiffusionPipeline.download(name, use_safetensors=True))
    except Exception as error:  # whatever the Hub's client raises: no network, no such name, no safetensors
        raise UserError(f"cannot download the pipeline '{name}': {one_line(error, 160)}") from error


def resolved(architecture: Architecture) -> Architecture:
    """The architecture of a checkpoint, as its configuration files have it, and its own image size; a latent model's
    may be another multiple of the VAE's factor. Raises `UserError` for a pipeline without a U-Net, a noise schedule of
    β and a first stage that we know."""
    folder = pipeline_folder(architecture.name.removeprefix(SCHEME))
    unet = _config(unet_folder(folder) / "config.json")
    scheduler = _config(_part(folder, "scheduler", "scheduler_config.json"))
    if "timesteps" in scheduler:  # as diffusers called it at first
        scheduler.setdefault("num_train_timesteps", scheduler["timesteps"])
    require(
        "beta_schedule" in scheduler or scheduler.get("trained_betas") is not None,
        f"the pipeline's {scheduler.get('_class_name')} has no schedule of β (beta_schedule, or trained_betas); valid: "
        "DDPMScheduler, and others of diffusers that have one",
    )
    kind = next((k for k, cls in UNETS.items() if cls == unet.get("_class_name")), None)
    require(
        kind is not None,
        f"{folder / 'unet'} is a {unet.get('_class_name')}; valid: {', '.join(UNETS.values())}",
    )
    require(
        not (folder / "vqvae").is_dir(),
        f"{folder} has a VQModel in front of its U-Net; valid: an AutoencoderKL, or none",
    )
    latent = (folder / "vae").is_dir()
    kept = {n: v for n, v in scheduler.items() if n in SCHEDULE}
    kept["clip_sample"] = scheduler.get("clip_sample", not latent)  # latents have no bounds
    options = {
        "unet": {n: v for n, v in unet.items() if n[0] != "_"},
        "scheduler": kept,
        "source": str(folder),
        **{n: v for n, v in architecture.options.items() if n == "prompt"},
    }
    try:
        size, channels = int(unet["sample_size"]), int(unet["in_channels"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder}: the U-Net's configuration must say sample_size and in_channels as whole numbers, but has "
            f"{unet.get('sample_size')} and {unet.get('in_channels')}"
        ) from None
    if latent:
        size, channels = _image_size(architecture.size, size, folder), 3
        options["unet"]["sample_size"] = size // _factor(folder)
    return replace(architecture, name=str(kind), size=size, channels=channels, options=options)


def _factor(folder: Path) -> int:
    """By how much the VAE's latents are smaller than its images."""
    blocks = _config(folder / "vae" / "config.json").get("block_out_channels", ())
    return int(2 ** (len(blocks) - 1))


def _image_size(asked: int, latent: int, folder: Path) -> int:
    """The size of a latent model's images: its own, or another that the VAE can halve as often, where one is asked for
    (a recipe that says nothing has the default of all architectures)."""
    factor = _factor(folder)
    own = latent * factor
    size = own if asked == Architecture().size else asked
    require(
        size % factor == 0, f"model.size must be a multiple of {factor} for this VAE (its own: {own}), but got {size}"
    )
    return size


def _part(folder: Path, name: str, file: str) -> Path:
    """A configuration of a pipeline's part: in a folder of its own or, as the first pipelines had it, beside the
    rest."""
    inner = folder / name / file
    return inner if inner.is_file() or not (folder / file).is_file() else folder / file


# What a `DDPMScheduler` shares with the other schedulers of diffusers: the noise schedule and the target.
SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def _config(path: Path) -> dict[str, Any]:
    require(path.is_file(), f"{path} is missing: not a pipeline with a U-Net and a scheduler")
    found = read_json(path)
    require(isinstance(found, dict), f"{path} is no configuration")
    return dict(found)


@dataclass(frozen=True)
class LatentImages(Preprocessing):
    """What a batch of latents goes through before the U-Net: nothing, they are scaled already."""

    def normalise(self, images: Tensor) -> Tensor:
        """float32 latents (n, c, h, w), as they are."""
        return images.float()

    def restore(self, images: Tensor) -> Tensor:
        """What `normalise` began with: latents."""
        return images.float()


def encoder(architecture: Architecture) -> Any | None:
    """The VAE in front of a latent U-Net, in evaluation mode; None for a U-Net on pixels."""
    source = architecture.options.get("source")
    if not source or not (Path(str(source)) / "vae").is_dir():
        return None
    try:
        vae = import_diffusers().AutoencoderKL.from_pretrained(str(source), subfolder="vae", use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read the VAE of {source} (safetensors alone): {one_line(error, 160)}") from error
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encoded(domain: Domain, architecture: Architecture, vae: Any, runtime: Runtime, batch: int = 32) -> Domain:
    """The domain's images as latents: the mean of the VAE's posterior × its scaling factor, float32, once and for all.
    Whoever fine-tunes a latent model keeps the VAE frozen, so nothing is lost by that."""
    vae = vae.to(runtime.device)
    factor = float(vae.config.scaling_factor)

    def encode(data: ImageData) -> ImageData:
        parts = []
        for start in range(0, len(data), batch):
            images, _ = data.batch(torch.arange(start, min(start + batch, len(data))), runtime)
            parts.append(vae.encode(images).latent_dist.mean * factor)
        latents = torch.cat(parts).float().contiguous()
        return replace(data, images=latents, preprocessing=LatentImages(architecture.size, architecture.channels))

    return replace(domain, train=encode(domain.train), validation=encode(domain.validation), test=encode(domain.test))


@torch.no_grad()
def decoded(latents: Tensor, vae: Any, runtime: Runtime, batch: int = 32) -> Tensor:
    """Latents as the VAE's images, uint8 (n, 3, h, w) on the CPU."""
    vae = vae.to(runtime.device)
    factor = float(vae.config.scaling_factor)
    parts = [vae.decode(part.to(runtime.device) / factor).sample.cpu() for part in torch.split(latents, batch)]
    return (torch.cat(parts) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
