"""What a diffusion model makes: images denoised from several levels, samples from noise (SOPHON, Figures 5 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.diffusion.denoisers import Denoiser, import_diffusers
from holdfast.layers import evaluating
from holdfast.runtime import Runtime
from holdfast.seeding import generator

STEPS = 25  # of the sampler from pure noise to an image, where the schedule has as many


def sampler(model: Denoiser) -> Any:
    """DDIM without noise (Song et al., ICLR 2021; η = 0), by diffusers, over `STEPS` of the model's timesteps; over all
    where there are fewer."""
    made = import_diffusers().DDIMScheduler.from_config(model.scheduler.config)
    made.set_timesteps(min(STEPS, len(model.alphas)))
    return made


@torch.no_grad()
def denoise(model: Denoiser, noisy: Tensor, start: int, runtime: Runtime, labels: Tensor | None = None) -> Tensor:
    """`noisy` (n, c, h, w) at the sampler's step `start` (0: pure noise, the last: hardly any), run back to an
    image, float32 in the model's own normalisation."""
    made = sampler(model)
    images = noisy
    with evaluating(model), runtime.autocast():
        for t in made.timesteps[start:].to(noisy.device):
            predicted = model(images, t.expand(len(images)), labels).float()
            images = made.step(predicted, t, images).prev_sample
    return images.float()


def sample_images(model: Denoiser, count: int, shape: Sequence[int], runtime: Runtime, batch: int = 64) -> Tensor:
    """`count` images of `shape` (c, h, w) from noise that is the same for every model, a class after another for a
    conditional one."""
    parts = []
    classes = model.classes or 1
    for first in range(0, count, batch):
        places = range(first, min(first + batch, count))
        noise = torch.stack([torch.randn(tuple(shape), generator=generator(0, "sample", i)) for i in places])
        labels = torch.tensor([i % classes for i in places], device=runtime.device) if model.conditional else None
        parts.append(denoise(model, runtime.images(noise.to(runtime.device)), 0, runtime, labels).cpu())
    return torch.cat(parts)


def strips(
    model: Denoiser, images: Tensor, labels: Tensor, starts: Sequence[int], runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """(levels, n, c, h, w) twice: `images` with noise as at the steps `starts` of a sampler of `STEPS`, and denoised
    from there."""
    times = sampler(model).timesteps
    starts = [s * len(times) // STEPS for s in starts]
    noise = torch.stack(
        [torch.randn(images.shape[1:], generator=generator(0, "strip", i)) for i in range(len(images))]
    ).to(images)
    known = model.told(labels)
    noisy = [model.diffuse(images, noise, times[s].to(images.device).expand(len(images))) for s in starts]
    clean = [denoise(model, x, s, runtime, known) for x, s in zip(noisy, starts, strict=True)]
    return torch.stack(noisy).cpu(), torch.stack(clean).cpu()
