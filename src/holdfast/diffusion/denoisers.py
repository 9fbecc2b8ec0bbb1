"""A diffusion model as a module: a U-Net of diffusers with its noise schedule (SOPHON, §2.1; Ho et al., NeurIPS 2020).

Everything that diffusers makes is imported where it is needed: the import takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import UserError, one_line, require

PREDICTIONS = ("epsilon", "v_prediction")
UNETS: Mapping[str, str] = {"unet2d": "UNet2DModel", "unet2d_condition": "UNet2DConditionModel"}
OPTIONS = ("unet", "scheduler", "conditional", "source", "prompt")
# A small U-Net: three resolutions, one residual block each, attention at the lowest. 1.1 M parameters.
SMALL: Mapping[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}


class Denoiser(nn.Module):
    """`unet` with the ᾱ_t of its `scheduler` (a `DDPMScheduler` or another of diffusers that has `alphas_cumprod`).

    The forward process is x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε. The network predicts ε (`epsilon`) or
    v = √ᾱ_t·ε − √(1 − ᾱ_t)·x_0 (`v_prediction`; Salimans & Ho, ICLR 2022). `reference`: the ᾱ_t on whose grid the model
    is measured; it stays when the schedule is exchanged. `context`: (1, tokens, width), what a text-conditioned U-Net
    is told.
    """

    alphas: Tensor
    reference: Tensor
    context: Tensor | None

    def __init__(self, unet: nn.Module, scheduler: Any, context: Tensor | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("reference", scheduler.alphas_cumprod.float().clone(), persistent=False)
        self.register_buffer("context", context, persistent=False)
        self.exchange(scheduler)

    def exchange(self, scheduler: Any) -> None:
        """Another noise schedule or prediction target for the same network. `UserError` for a target we cannot use."""
        prediction = scheduler.config.prediction_type
        require(
            prediction in PREDICTIONS,
            f"prediction_type must be one of {', '.join(PREDICTIONS)}, but the scheduler has '{prediction}'",
        )
        self.scheduler, self.prediction = scheduler, prediction
        alphas = scheduler.alphas_cumprod.float().clone().to(self.reference.device)
        self.register_buffer("alphas", alphas, persistent=False)

    @property
    def classes(self) -> int:
        """How many classes the network can be told; 0 for one that is told none."""
        embedding = getattr(self.unet, "class_embedding", None)
        return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else 0

    @property
    def conditional(self) -> bool:
        """Whether the network is told the class."""
        return self.classes > 0

    def told(self, labels: Tensor) -> Tensor | None:
        """The classes that the network is told, (n,) int64; of shares of classes (n, C), as mixup makes them, the
        largest; None for a network that is told none."""
        if not self.conditional:
            return None
        return labels.argmax(1) if labels.ndim == 2 else labels

    def feature_layer(self) -> str:
        """Where features are taken that stand for an image: the lowest resolution's output."""
        return "unet.mid_block"

    def head_layers(self) -> list[str]:
        """What depends on the number of classes: the table of class embeddings, where there is one."""
        return ["unet.class_embedding"] if self.conditional else []

    def forward(self, noisy: Tensor, timesteps: Tensor | int | None = None, labels: Tensor | None = None) -> Tensor:
        """The network's prediction, of `noisy`'s shape (n, c, h, w). `timesteps`: (n,) int64 or one for all; default:
        the middle. `labels`: (n,) int64, for a conditional network; default: zeros."""
        steps = len(self.alphas) // 2 if timesteps is None else timesteps
        given: dict[str, Any] = {}
        if self.conditional:
            given["class_labels"] = torch.zeros_like(noisy[:, 0, 0, 0], dtype=torch.int64) if labels is None else labels
        if self.context is not None:
            given["encoder_hidden_states"] = self.context.expand(len(noisy), -1, -1).to(noisy.dtype)
        predicted: Tensor = self.unet(noisy, steps, **given, return_dict=False)[0]
        return predicted

    def diffuse(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of the forward process."""
        signal, share = self._shares(timesteps)
        return signal * images + share * noise

    def target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is to predict: ε or v."""
        if self.prediction == "epsilon":
            return noise
        signal, share = self._shares(timesteps)
        return signal * noise - share * images

    def noise_of(self, predicted: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """ε̂ from a prediction of either kind: √(1 − ᾱ_t)·x_t + √ᾱ_t·v̂."""
        if self.prediction == "epsilon":
            return predicted
        signal, share = self._shares(timesteps)
        return share * noisy + signal * predicted

    def _shares(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.alphas[timesteps].view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def at_level(self, places: Tensor) -> Tensor:
        """For timesteps of the reference schedule, those of the own one with the nearest log signal-to-noise ratio."""
        if len(self.alphas) == len(self.reference) and torch.equal(self.alphas, self.reference):
            return places
        wanted = torch.logit(self.reference[places].double(), 1e-12)
        own = torch.logit(self.alphas.double(), 1e-12)
        return (wanted[:, None] - own[None, :]).abs().argmin(1)


def build_denoiser(kind: str, options: Mapping[str, Any], size: int, channels: int, classes: int) -> Denoiser:
    """A fresh denoiser, initialised by torch's generators.

    `kind`: `unet2d` or `unet2d_condition`; `options`: `unet` (arguments of the class; for `unet2d` laid over a small
    default), `scheduler` (arguments of `DDPMScheduler`), `conditional` (class embeddings), `source` (the pipeline
    folder whose other parts are used), `prompt` (what a text-conditioned U-Net is told). Raises `UserError`.
    """
    require(
        set(options) <= set(OPTIONS),
        f"options of '{kind}' are {', '.join(OPTIONS)}, but got {', '.join(sorted(set(options) - set(OPTIONS)))}",
    )
    for name in ("unet", "scheduler"):
        given = options.get(name, {})
        require(isinstance(given, Mapping), f"options.{name} of '{kind}' holds arguments by name, but got {given!r}")
    told = options.get("conditional", False)
    require(isinstance(told, bool), f"options.conditional of '{kind}' must be true or false, but got {told!r}")
    diffusers = import_diffusers()
    settings = {**options.get("unet", {})}
    if kind == "unet2d":
        settings = {**SMALL, **_blocks(settings), "sample_size": size, "in_channels": channels, **settings}
        settings.setdefault("out_channels", channels)
    if options.get("conditional") or settings.get("num_class_embeds"):
        settings["num_class_embeds"] = classes
    settings = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items() if not n.startswith("_")}
    try:
        unet = getattr(diffusers, UNETS[kind])(**settings)
        scheduler = diffusers.DDPMScheduler(**{n: v for n, v in options.get("scheduler", {}).items() if n[0] != "_"})
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"cannot build '{kind}': {one_line(error, 200)}") from error
    _check_schedule(scheduler.alphas_cumprod)
    context = context_of(options) if kind == "unet2d_condition" else None
    if context is None and kind == "unet2d_condition":
        context = torch.zeros(1, 1, unet.config.cross_attention_dim)
    return Denoiser(unet, scheduler, context)


def _check_schedule(alphas: Tensor) -> None:
    """`UserError` for a noise schedule whose ᾱ_t are no shares, or that has no timesteps."""
    require(len(alphas) >= 1, "the noise schedule has no timesteps; num_train_timesteps must be at least 1")
    good = bool(alphas.isfinite().all()) and float(alphas.min()) >= 0 and float(alphas.max()) <= 1
    require(good, "the noise schedule's ᾱ_t must lie in [0, 1]; check beta_start, beta_end and trained_betas")


def _blocks(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Attention at the lowest resolution alone, whatever the number of resolutions."""
    count = len(settings.get("block_out_channels", SMALL["block_out_channels"]))
    return {
        "down_block_types": ("DownBlock2D",) * (count - 1) + ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * (count - 1),
    }


def import_diffusers() -> Any:
    """diffusers, or one line that says how to get it."""
    try:
        import diffusers
    except ImportError:
        raise UserError("diffusion models need diffusers: pip install 'holdfast[diffusion]'") from None
    return diffusers


@lru_cache(maxsize=4)
def prompt_embedding(source: str, prompt: str) -> Tensor | None:
    """What the pipeline's own text encoder makes of a prompt, (1, tokens, width); None where it has no text encoder."""
    folder = Path(source)
    if not (folder / "text_encoder").is_dir() or not (folder / "tokenizer").is_dir():
        return None
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model: Any = CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True)
    model.eval()
    length = model.config.max_position_embeddings
    tokens = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found: Tensor = model(tokens.input_ids)[0]
    return found


def context_of(options: Mapping[str, Any]) -> Tensor | None:
    """The text embedding that `options` ask for: of `prompt` (default: the empty one), by `source`'s text encoder."""
    source = options.get("source")
    return prompt_embedding(str(source), str(options.get("prompt", ""))) if source else None
