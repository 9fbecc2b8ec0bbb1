"""Reverse-MAML ("Transfer Resistant Model Training", 2023): weights from which adapting to original tasks goes well, to
restricted ones badly. Second-order, first-order (FOMAML) and Reptile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value
from torch.nn.attention import SDPBackend, sdpa_kernel

from holdfast.defences.base import Engine, Given, Guarded, require_positive, require_rates, require_tolerance
from holdfast.defences.probing import Prober
from holdfast.domains import ImageData
from holdfast.errors import require
from holdfast.layers import initialise_head
from holdfast.optimisers import adam
from holdfast.seeding import derive, generator, seeded
from holdfast.simulation import Accumulator
from holdfast.training import Batch

TEST_EPISODES = 50
Weights = dict[str, Tensor]
LossOf = Callable[[Weights, Batch], Tensor]


def adapt(weights: Weights, support: Batch, loss: LossOf, lr: float, steps: int) -> Weights:
    """θ′: `steps` steps of gradient descent at `lr` on the support set. Differentiable in `weights`."""
    for _ in range(steps):
        gradients = grad(loss)(weights, support)
        weights = {n: w - lr * gradients[n] for n, w in weights.items()}
    return weights


def meta_gradient(
    weights: Weights, support: Batch, query: Batch, loss: LossOf, lr: float, steps: int, order: str
) -> tuple[Weights, Tensor]:
    """Gradient of the query loss after adaptation, and that loss.

    - `second` (MAML): d L(θ′(θ); query)/dθ, through all inner steps.
    - `first` (FOMAML): ∂L(θ′; query)/∂θ′, dθ′/dθ taken to be the identity.
    - `reptile`: (θ − θ′)/(lr·steps), the mean of the inner gradients; adapts on the support set alone.
    """
    if order == "second":

        def outer(start: Weights) -> Tensor:
            return loss(adapt(start, support, loss, lr, steps), query)

        found, value = grad_and_value(outer)(weights)
        return found, value
    after = adapt(weights, support, loss, lr, steps)
    if order == "reptile":
        with torch.no_grad():
            return {n: (weights[n] - after[n]) / (lr * steps) for n in weights}, loss(after, query)
    first, value = grad_and_value(loss)(after, query)
    return first, value


@dataclass(frozen=True)
class ReverseMAML(Guarded):
    """Hyper-parameters of Reverse-MAML. The paper gives the idea and no values: these are ours, after MAML's.

    An iteration draws `tasks` few-shot episodes of each domain. An episode has `shots` images a class to adapt on and
    `queries` to judge by, of `ways` classes (default: all), and a head of its own, as an attacker's new last layer. The
    weights descend on the original episodes' query loss after adaptation and ascend on the restricted ones', which
    counts no further than `bound`; a plain step on original images, weighted by `anchor`, keeps the released head.
    """

    order: Literal["second", "first", "reptile"] = "second"  # paper: second; the others are its future work
    inner_lr: float = 0.1
    inner_steps: int = 3
    tasks: int = 2  # of each domain, an iteration
    ways: int | None = None
    shots: int = 5
    queries: int = 10
    ascent: float = 1.0  # weight of the restricted episodes
    bound: float = 5.0  # on a restricted episode's loss; beyond it, it has no gradient
    anchor: float = 1.0
    batch_size: int = 128  # of the anchor
    iterations: int = 1000
    lr: float = 1e-3  # of the outer Adam
    clip: float = 1.0  # L2 norm of the outer gradient
    tolerance: float = 0.05
    check_every: int = 50
    probe_steps: int = 50  # of the adversary behind the curve "restricted"
    measures: ClassVar[bool] = True
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require_positive(self, "inner_steps", "tasks", "shots", "queries", "batch_size", "iterations")
        require_positive(self, "check_every", "probe_steps")
        require_rates(self, "inner_lr", "lr")
        require(
            self.order in ("second", "first", "reptile"), f"unknown order '{self.order}'; valid: second, first, reptile"
        )
        require(self.ways is None or self.ways >= 2, f"ways must be at least 2, but got {self.ways}")
        for name in ("ascent", "anchor"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, but got {getattr(self, name)}")
        require(self.bound > 0 and self.clip > 0, f"bound and clip must be positive, got {self.bound} and {self.clip}")
        require_tolerance(self)

    def check_classes(self, original: int, restricted: int) -> None:
        """Both domains must have as many classes as an episode."""
        require(
            self.ways is None or self.ways <= min(original, restricted),
            f"ways = {self.ways}, but there are {original} original and {restricted} restricted classes",
        )

    def engine(self, given: Given) -> _Engine:
        """Learners with heads for episodes, and the outer Adam."""
        return _Engine(self, given)

    def measure(self, given: Given, restricted: ImageData) -> Mapping[str, float]:
        """Mean query accuracy of 50 test episodes of each domain, after adaptation."""
        parts = {"restricted": (restricted, given.classes), "original": (given.original.test, None)}
        found = {}
        for name, (data, classes) in parts.items():
            episodes = Episodes(self, given, data, classes or len(given.original.classes))
            values = [episodes.accuracy(derive(given.seed, "test episode", name, n)) for n in range(TEST_EPISODES)]
            found[f"few-shot accuracy, {name}"] = sum(values) / len(values)
        return found


def episode(data: ImageData, ways: int | None, shots: int, queries: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of a support set (`shots` a class) and a query set (`queries`), disjoint, of `ways` random classes.
    A class with too few images gives what it has, half of it at most to the query set; one with a single image takes no
    part. `UserError` where too few classes are left."""
    kinds, counts = torch.unique(data.labels.cpu(), return_counts=True)
    classes = kinds[counts >= 2]
    require(
        len(classes) >= max(2, ways or 2),
        f"an episode needs {max(2, ways or 2)} classes of at least 2 images, but there are {len(classes)}",
    )
    chosen = classes if ways is None else classes[torch.randperm(len(classes), generator=rng)[:ways]]
    support, query = [], []
    for c in chosen.tolist():
        where = torch.nonzero(data.labels.cpu() == c).flatten()
        where = where[torch.randperm(len(where), generator=rng)]
        n = min(queries, max(1, len(where) // 2))
        query.append(where[:n])
        support.append(where[n : n + shots])
    return torch.cat(support), torch.cat(query)


class Episodes:
    """Few-shot episodes of one domain on the body of `given.model`, each with a fresh head; `classes`: the domain's."""

    def __init__(self, spec: ReverseMAML, given: Given, data: ImageData, classes: int) -> None:
        self.spec, self.given, self.data = spec, given, data
        self.classes = spec.ways or classes
        self.learner = given.learner(self.classes)
        self.heads = given.architecture.head(self.learner, self.classes)
        self.fresh = tuple(f"{h}." for h in self.heads)

    def _draw(self, seed: int) -> tuple[Weights, Batch, Batch]:
        """The weights to start from, a support and a query set whose labels count the episode's classes."""
        spec, given = self.spec, self.given
        parts = episode(self.data, spec.ways, spec.shots, spec.queries, generator(seed))
        support, query = (self.data.batch(p, given.runtime) for p in parts)
        kinds = torch.unique(support[1])  # sorted: labels become their places in it
        support, query = ((x, torch.searchsorted(kinds, y)) for x, y in (support, query))
        for head in self.heads:
            initialise_head(self.learner.get_submodule(head), generator(seed, "head", head))
        own = dict(given.model.named_parameters())
        named = self.learner.named_parameters()
        return {n: (p if n.startswith(self.fresh) else own[n]).detach() for n, p in named}, support, query

    def _outputs(self, weights: Weights, images: Tensor) -> Tensor:
        buffers = {n: b.detach().clone() for n, b in self.given.model.named_buffers()}
        with self.given.runtime.autocast():
            found: Tensor = functional_call(self.learner, (weights, buffers), (images,))
        return found

    def _loss(self, weights: Weights, batch: Batch) -> Tensor:
        return self.given.task.loss(self._outputs(weights, batch[0]), batch[1])

    def gradient(self, seed: int) -> tuple[Weights, float]:
        """The meta-gradient for the body's weights, and the query loss after adaptation."""
        spec = self.spec
        weights, support, query = self._draw(seed)
        self.learner.train()
        # Fused attention has no second derivative.
        with seeded(seed, "task"), sdpa_kernel(SDPBackend.MATH):
            gradient, value = meta_gradient(
                weights, support, query, self._loss, spec.inner_lr, spec.inner_steps, spec.order
            )
        return {n: g.detach() for n, g in gradient.items() if not n.startswith(self.fresh)}, value.item()

    def accuracy(self, seed: int) -> float:
        """The query metric after adaptation."""
        spec = self.spec
        weights, support, query = self._draw(seed)
        self.learner.train()
        with seeded(seed, "task"):
            after = adapt(weights, support, self._loss, spec.inner_lr, spec.inner_steps)
            with torch.no_grad():
                return self.given.task.score(self._outputs(after, query[0]), query[1]).mean().item()


class _Engine(Engine):
    def __init__(self, spec: ReverseMAML, given: Given) -> None:
        self.spec, self.given, self.length = spec, given, spec.iterations
        self.adam = adam(given.model.parameters(), spec.lr)
        self.states = {"adam": self.adam}
        self.restricted_metric = Prober(given, spec.probe_steps)
        self.episodes = {
            "original": Episodes(spec, given, given.original.train, len(given.original.classes)),
            "restricted": Episodes(spec, given, given.restricted, given.classes),
        }

    def iterate(self, iteration: int, strength: float) -> Mapping[str, float]:
        """One outer step."""
        spec, given = self.spec, self.given
        total, losses = Accumulator(), {"original task": 0.0, "restricted task": 0.0}
        for number in range(spec.tasks):
            for name, weight in (("original", 1.0), ("restricted", -spec.ascent * strength)):
                gradient, loss = self.episodes[name].gradient(derive(given.seed, "episode", name, iteration, number))
                losses[f"{name} task"] += loss / spec.tasks
                if name == "original" or loss < spec.bound:
                    total.add(list(gradient), list(gradient.values()), weight / spec.tasks)
        losses["anchor"] = self._anchor(iteration, total)
        total.apply(given.model)
        nn.utils.clip_grad_norm_(given.model.parameters(), spec.clip)
        self.adam.step()
        return losses

    def _anchor(self, iteration: int, total: Accumulator) -> float:
        """Add the gradient of the plain loss on an original batch; batch statistics follow these images alone."""
        spec, given, model = self.spec, self.given, self.given.model
        (batch,) = given.batches(given.original.train, spec.batch_size, "anchor", iteration - 1)
        model.train()
        with seeded(given.seed, "anchor", iteration), given.runtime.autocast():
            outputs = model(batch[0])
        loss = given.task.loss(outputs, batch[1])
        names, parameters = zip(*model.named_parameters(), strict=True)
        total.add(names, torch.autograd.grad(loss, parameters, allow_unused=True), spec.anchor)
        return loss.item()
