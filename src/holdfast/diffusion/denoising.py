"""The task of a diffusion model: to tell the noise in an image (SOPHON, §2.1, §4.3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from holdfast import losses
from holdfast.diffusion.denoisers import Denoiser
from holdfast.errors import UserError, one_line, require
from holdfast.layers import evaluating
from holdfast.scales import MSE, Scale
from holdfast.seeding import generator
from holdfast.tasks import Loss, chosen_loss

LEVELS = 20  # noise levels of the fixed grid
WORST = 2.0  # the MSE at which an image counts no worse: that of noise against noise


def grid(steps: int, levels: int = LEVELS) -> list[int]:
    """`levels` timesteps in the middles of equal parts of 0 … `steps` − 1."""
    return [int((j + 0.5) * steps / levels) for j in range(levels)]


@dataclass(frozen=True)
class Denoising:
    """Mean squared error of the predicted noise. Models are `Denoiser`s; `outputs` are (n, 3, c, h, w): what was
    predicted, what was to be, and ᾱ_t, the share that the image has in what the model saw.

    In training, timestep and noise are drawn from torch's generators, and the target is the network's own (ε or v). In
    evaluation it is always ε, on a fixed grid: image i of the data meets level 7·i mod 20 (so that a few images meet
    little noise and much) and noise of its own seed, so figures compare across models, runs, prediction targets and
    schedules. The metric is 1 − MSE: for noise of variance 1 the share of it that is explained.

    `zero`: the MSE of a network that answers zero. For ε it is 1; a v of zero stands for the noise √(1 − ᾱ)·x_t, whose
    MSE is less.
    """

    zero: float = 1.0

    scale: ClassVar[Scale] = MSE
    name: ClassVar[str] = "denoising"
    labelled: ClassVar[bool] = False
    generates: ClassVar[bool] = True
    least_classes: ClassVar[int] = 1
    SUPPRESSION: ClassVar[Mapping[str, Loss]] = MappingProxyType(
        {
            "dos": losses.denial_of_service,
            "mse": losses.inverse_mse,
            "dos_signal": losses.signal_weighted_denial_of_service,
        }
    )

    def check(self, model: nn.Module, example: Tensor | None = None) -> None:
        """Only a `Denoiser` has a noise schedule; what it makes of `example` (n, c, h, w) must have its shape."""
        if not isinstance(model, Denoiser):
            raise UserError(
                f"the task denoising needs a diffusion model (model.name unet2d, or diffusers:FOLDER), but got "
                f"{type(model).__name__}"
            )
        if example is None:
            return
        try:
            with torch.no_grad(), evaluating(model):
                shape = tuple(model(example).shape)
        except Exception as error:  # whatever a U-Net raises for inputs that it was not made for
            raise UserError(
                f"the U-Net cannot work on inputs of {tuple(example.shape[1:])}: {one_line(error, 160)}"
            ) from error
        require(
            shape == tuple(example.shape),
            f"the U-Net must answer with the shape of its input, {tuple(example.shape[1:])}, but gives {shape[1:]}",
        )

    def fitted(self, model: nn.Module, images: Tensor) -> Denoising:
        """The task with `zero` as it is for `model`'s prediction target, on `images` as it sees them."""
        model = _denoiser(model)
        if model.prediction == "epsilon":
            return Denoising()
        noise, steps = self.fixed(model, images, 0)
        noisy = model.diffuse(images, noise, steps)
        meant = model.noise_of(torch.zeros_like(noisy), noisy, steps)
        return Denoising(zero=(meant - noise).square().mean().item())

    def forward(self, model: nn.Module, inputs: Tensor, targets: Tensor, first: int | None = None) -> Tensor:
        """Diffuse `inputs` (n, c, h, w), let the model predict, and stack prediction and truth."""
        model = _denoiser(model)
        noise, steps = self.drawn(model, inputs) if first is None else self.fixed(model, inputs, first)
        return self.compared(model, inputs, noise, steps, model.told(targets), own=first is None)

    def beside(self, model: nn.Module, teacher: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and the MSE between both networks' predictions for the same noisy images. For the best teacher
        there is, E[ε | x_t], its gradient is that of the MSE, without the noise of what no network can predict;
        another's faults are learned with the rest."""
        model, teacher = _denoiser(model), _denoiser(teacher)
        noise, steps = self.drawn(model, inputs)
        noisy, labels = model.diffuse(inputs, noise, steps), model.told(targets)
        with torch.no_grad():
            answers = teacher(noisy, steps, labels).float()
        outputs = self.compared(model, inputs, noise, steps, labels, own=True)
        return outputs, losses.noise_error(torch.stack([outputs[:, 0], answers], 1)).mean()

    @staticmethod
    def drawn(model: Denoiser, images: Tensor) -> tuple[Tensor, Tensor]:
        """Noise of `images`' shape and timesteps (n,), from torch's generators."""
        steps = torch.randint(len(model.alphas), (len(images),), device=images.device)
        return torch.randn_like(images), steps

    @staticmethod
    def fixed(model: Denoiser, images: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The evaluation's noise and timesteps, of images `first` … of the data."""
        steps = model.at_level(fixed_steps(first, len(images), len(model.reference)).to(images.device))
        return fixed_noise(first, images), steps

    @staticmethod
    def compared(
        model: Denoiser, images: Tensor, noise: Tensor, steps: Tensor, labels: Tensor | None, own: bool
    ) -> Tensor:
        """(n, 3, c, h, w): prediction and target at given timesteps, in the model's `own` terms or as noise, and ᾱ."""
        noisy = model.diffuse(images, noise, steps)
        predicted = model(noisy, steps, labels).float()  # under autocast it is not
        share = model.alphas[steps].view(-1, 1, 1, 1).expand_as(images)
        if own:
            return torch.stack([predicted, model.target(images, noise, steps), share], 1)
        return torch.stack([model.noise_of(predicted, noisy, steps), noise, share], 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """MSE, in float32 whatever the outputs are."""
        return losses.noise_error(outputs).mean()

    def suppression(self, name: str | None) -> Loss:
        """`dos` (Eq. 16; the default), `mse`: the MSE, negated (Eq. 15), or `dos_signal`, ours."""
        return chosen_loss(self.SUPPRESSION, name)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1 − MSE of each image, no less than −1; so much too where the outputs are not finite."""
        error = losses.noise_error(outputs)
        return 1 - torch.where(error.isfinite(), error, WORST).clamp(max=WORST)

    def chance(self, targets: Tensor) -> float:
        """What a network that answers zero reaches."""
        return 1 - self.zero


def _denoiser(model: nn.Module) -> Denoiser:
    if not isinstance(model, Denoiser):
        raise TypeError(f"expected a Denoiser, got {type(model).__name__}")
    return model


def fixed_steps(first: int, count: int, steps: int) -> Tensor:
    """The grid's timesteps of images `first` … `first + count − 1`, (count,) int64: every level in any 20 in a row, and
    low and high ones in any three."""
    levels = torch.tensor(grid(steps))
    return levels[7 * (torch.arange(count) + first) % len(levels)]


def fixed_noise(first: int, images: Tensor) -> Tensor:
    """Standard normal noise of `images`' shape; that of an image depends on its place in the data alone."""
    drawn = [
        torch.randn(images.shape[1:], generator=generator(0, "evaluation noise", first + i)) for i in range(len(images))
    ]
    return torch.stack(drawn).to(images)
