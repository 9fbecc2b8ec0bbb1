"""Encoders pre-trained without labels: SimCLR (Chen et al., ICML 2020) and MoCo v2 (Chen et al., 2020), by lightly's
loss and heads; then a head trained on the frozen body, so that the model has classes."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from holdfast.checkpoints import Checkpoint
from holdfast.domains import Domain, ImageData
from holdfast.errors import UserError, require
from holdfast.features import Tap
from holdfast.finetuning import FineTuning
from holdfast.models import Architecture, State, state_of
from holdfast.pretraining import train
from holdfast.progress import Reporter
from holdfast.runtime import Runtime
from holdfast.seeding import derive, seeded
from holdfast.tasks import Task
from holdfast.training import evaluate, minibatches


@dataclass(frozen=True)
class SelfSupervision:
    """How the body is pre-trained. `hidden` and `projection`: widths of the projection head. `queue` and `momentum`:
    MoCo's dictionary and its slow encoder. `temperature`: null for the papers' 0.5 (SimCLR) and 0.2 (MoCo v2).
    Optimiser, steps, batch size: the recipe's `pretrain`. Then a linear head, `head_steps` of Adam at `head_lr`."""

    method: Literal["simclr", "moco-v2"] = "simclr"
    temperature: float | None = None
    hidden: int = 256  # papers: 2048, the width of ResNet-50's features
    projection: int = 128
    queue: int = 4096  # paper: 65536
    momentum: float = 0.99  # paper: 0.999, over 100 times as many steps
    flip: bool = True  # digits should not be mirrored
    head_steps: int = 400
    head_lr: float = 1e-2
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(self.method in ("simclr", "moco-v2"), f"method must be simclr or moco-v2, but got '{self.method}'")
        for name in ("hidden", "projection", "queue", "head_steps"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, but got {getattr(self, name)}")
        require(0 <= self.momentum < 1, f"momentum must lie in [0, 1), but got {self.momentum}")
        require(0 < self.head_lr <= 1, f"head_lr must lie in (0, 1], but got {self.head_lr}")
        require(
            self.temperature is None or self.temperature > 0, f"temperature must be positive, got {self.temperature}"
        )


@dataclass(frozen=True)
class Views(ImageData):
    """Batches of two augmented views of each image, one after the other: (2b, c, h, w), labels likewise. The papers'
    augmentation: random crop, flip, colour jitter, grey, blur. A function of the indices and `seed`."""

    seed: int = 0
    flip: bool = True

    def batch(self, indices: Tensor, runtime: Runtime) -> tuple[Tensor, Tensor]:
        """Normalised views and labels on the runtime's device."""
        where = indices.to(self.images.device)
        augment = _augmentation(self.preprocessing.size, self.preprocessing.channels, self.flip)
        with seeded(self.seed, "views", *indices.tolist()):
            views = torch.stack([augment(image) for _ in range(2) for image in self.images[where]])
        images = self.preprocessing.normalise(views.to(runtime.device))
        return runtime.images(images), self.labels[where].repeat(2).to(runtime.device)


def _augmentation(size: int, channels: int, flip: bool) -> Any:
    from torchvision.transforms import v2

    colour = (
        [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)] if channels == 3 else []
    )
    blur = [v2.RandomApply([v2.GaussianBlur(size // 20 * 2 + 3, (0.1, 2.0))], 0.5)] if size >= 32 else []
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            *([v2.RandomHorizontalFlip()] if flip else []),
            *colour,
            *blur,
        ]
    )


class Encoder(nn.Module):
    """A classifier's body (what its head sees) with a projection head."""

    def __init__(self, model: nn.Module, head: str, projection: nn.Module) -> None:
        super().__init__()
        self.model, self.head, self.projection = model, head, projection

    def forward(self, images: Tensor) -> Tensor:
        with Tap(self.model, self.head) as tap:
            self.model(images)
        return self.projection(tap.value.flatten(1))  # type: ignore[no-any-return]


class Pair(nn.Module):
    """Both views through one encoder (SimCLR), or the second through its slow copy (MoCo); outputs (2b, projection)."""

    def __init__(self, encoder: Encoder, momentum: float | None) -> None:
        super().__init__()
        self.encoder, self.momentum = encoder, momentum
        self.slow = copy.deepcopy(encoder).requires_grad_(False) if momentum is not None else None

    def forward(self, views: Tensor) -> Tensor:
        if self.slow is None:
            return self.encoder(views)  # type: ignore[no-any-return]
        first, second = views.chunk(2)
        with torch.no_grad():
            key = self.slow(second)
        return torch.cat([self.encoder(first), key])

    def follow(self) -> None:
        """The slow encoder follows: an exponential moving average."""
        from lightly.models.utils import update_momentum

        if self.slow is not None and self.momentum is not None:
            update_momentum(self.encoder, self.slow, self.momentum)


class Queue:
    """The state of MoCo's dictionary, which lightly's loss leaves out of its own."""

    def __init__(self, contrast: Any) -> None:
        self.bank = contrast.memory_bank

    def state_dict(self) -> dict[str, Tensor]:
        """The keys, and where the next go."""
        return {"bank": self.bank.bank.clone(), "pointer": self.bank.bank_ptr.clone()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Back to a state."""
        self.bank.bank.copy_(state_dict["bank"])
        self.bank.bank_ptr.copy_(state_dict["pointer"])


def pretrain_encoder(
    architecture: Architecture,
    domain: Domain,
    tuning: FineTuning,
    spec: SelfSupervision,
    task: Task,
    runtime: Runtime,
    *,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    reporter: Reporter | None = None,
) -> State:
    """Pre-train the body on `domain.train` without its labels, then a head with them; returns the weights."""
    try:
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import MoCoProjectionHead, SimCLRProjectionHead
    except ImportError:
        raise UserError("pre-training without labels needs lightly: pip install 'holdfast[ssl]'") from None
    reporter = reporter or Reporter(quiet=True)
    classes, seed = len(domain.classes), derive(seed, "self-supervised")
    model = runtime.place(architecture.build(classes, seed))
    head = architecture.head(model, classes)[0]
    width = model.get_submodule(head).weight[0].numel()  # type: ignore[index]
    slow = spec.method == "moco-v2"
    with seeded(seed, "projection"):
        made = (MoCoProjectionHead if slow else SimCLRProjectionHead)(width, spec.hidden, spec.projection)
        bank = (spec.queue, spec.projection) if slow else 0
        contrast = NTXentLoss(spec.temperature or (0.2 if slow else 0.5), bank).to(runtime.device)
    pair = Pair(Encoder(model, head, made), spec.momentum if slow else None)
    runtime.place(pair)
    views = Views(domain.train.images, domain.train.labels, domain.train.preprocessing, seed, spec.flip)

    def loss(outputs: Tensor, _: Tensor) -> Tensor:
        found: Tensor = contrast(*outputs.float().chunk(2))
        return found

    train(
        pair,
        lambda first: minibatches(views, tuning.batch_size, tuning.steps, derive(seed, "data"), runtime, first),
        loss,
        replace(tuning, train="all"),
        list(itertools.chain(model.parameters(), made.parameters())),
        runtime=runtime,
        seed=seed,
        others={"queue": Queue(contrast)} if slow else {},
        checkpoint=checkpoint,
        reporter=reporter,
        after=pair.follow,
    )
    return _with_head(model, architecture, domain, spec, task, runtime, seed, reporter)


def _with_head(
    model: nn.Module,
    architecture: Architecture,
    domain: Domain,
    spec: SelfSupervision,
    task: Task,
    runtime: Runtime,
    seed: int,
    reporter: Reporter,
) -> State:
    classes = len(domain.classes)
    tuning = FineTuning.named(
        "initFC+FC", optimiser="adam", lr=spec.head_lr, weight_decay=0.0, schedule="cosine", steps=spec.head_steps
    )
    tuning.initialise_from(model, model.state_dict(), architecture, classes, seed)
    tuning.run(model, domain.train, task, architecture, classes, runtime=runtime, seed=seed)
    metric, _ = evaluate(model, domain.validation, task, runtime)
    reporter.say(
        f"pretrain: {spec.method}, {task.scale.name} {task.scale.shown(metric)} of a linear head on "
        f"validation data of {domain.name}"
    )
    return state_of(model)
