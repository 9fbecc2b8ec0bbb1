"""What a run rests on: a recipe's data, model and attacks, read and checked before any work begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, arange, nn

from holdfast import models
from holdfast.attacks.attack import Attack, attack_facts
from holdfast.attacks.batteries import battery
from holdfast.audit import HEALING_SHARE
from holdfast.bundle import read_weights
from holdfast.cells import Bench, Ground
from holdfast.defences.base import Given
from holdfast.diffusion import pipelines
from holdfast.diffusion.exhibits import check_exhibits
from holdfast.distributed import current
from holdfast.domains import Domain, DomainSpec, ImageData, load_domain, parse_selection, parts_of, sample
from holdfast.errors import require
from holdfast.files import fingerprint, sha256_file
from holdfast.models import Architecture, State
from holdfast.packaging import find_weights
from holdfast.recipes import Recipe
from holdfast.runtime import Runtime
from holdfast.seeding import derive
from holdfast.tasks import Task
from holdfast.tasktable import TASKS, task_for

Pixels = dict[tuple[Any, ...], Domain]  # by what decides which images are taken, how they are read, and where they lie


@dataclass
class Inputs:
    """A recipe, resolved as it is needed; every property is read once.

    `protected`: somebody else's protected weights (file or bundle folder), to be audited instead of protecting;
    `with_original`: whether there is an original domain (an audit of a checkpoint may lack it). `pixels`: domains that
    are decoded already; runs on the same data share them.
    """

    recipe: Recipe
    protected: str | None = None
    with_original: bool = True
    pixels: Pixels = field(default_factory=dict, repr=False)

    @cached_property
    def runtime(self) -> Runtime:
        """The resolved device and precision."""
        spec = self.recipe.runtime
        return Runtime.choose(spec.device, spec.precision, spec.compile, spec.checkpointing)  # type: ignore[arg-type]

    @cached_property
    def architecture(self) -> Architecture:
        """The model, with the normalisation of timm's weights where those are used; a checkpoint of diffusers as its
        configuration has it."""
        arch = self.recipe.model
        if pipelines.is_checkpoint(arch):
            return pipelines.resolved(arch)
        return models.with_pretrained_normalisation(arch) if self.recipe.weights == "timm" else arch

    @cached_property
    def weights(self) -> str | None:
        """The recipe's weights; those of a checkpoint of diffusers by their folder."""
        if self.recipe.weights != "diffusers":
            return self.recipe.weights
        source = self.architecture.options.get("source")
        require(
            bool(source), "weights: diffusers needs a checkpoint, model.name diffusers:FOLDER or diffusers:HUB/NAME"
        )
        return str(source)

    @cached_property
    def task(self) -> Task:
        """What the model is for."""
        return TASKS[self.recipe.task or task_for(self.architecture)]

    @cached_property
    def measured(self) -> Task:
        """The task, with chance as it is for this model on restricted test images: on as many as an evaluation sees at
        once, for a task that needs none must not bring a whole test set to the device."""
        data = self.restricted.test
        images, _ = data.batch(arange(min(len(data), 500)), self.runtime)
        model = self.runtime.place(self.architecture.build(len(self.head_classes)))
        return self.task.fitted(model, images)

    def _decoded(self, spec: DomainSpec) -> Domain:
        """The images of a domain, on the device."""
        how = (self.architecture.preprocessing, self.recipe.seed, self.task.least_classes)
        key = (spec, *how, self.runtime.device)
        if key not in self.pixels:
            self.pixels[key] = load_domain(spec, *how).to(self.runtime)
        return self.pixels[key]

    @cached_property
    def _encoder(self) -> Any | None:
        return pipelines.encoder(self.architecture)

    def _load(self, spec: DomainSpec) -> Domain:
        """What the model works on: the images, or their latents."""
        pixels = self._decoded(spec)
        if self._encoder is None:
            return pixels
        return pipelines.encoded(pixels, self.architecture, self._encoder, self.runtime)

    def decode(self, images: Tensor) -> Tensor:
        """What the model works on as pictures, uint8 (n, c, h, w)."""
        if self._encoder is None:
            return self.architecture.preprocessing.restore(images)
        return pipelines.decoded(images, self._encoder, self.runtime)

    @cached_property
    def original(self) -> Domain:
        """The original domain, on the device."""
        return self._load(self.recipe.original)

    @cached_property
    def restricted(self) -> Domain:
        """The restricted domain, on the device."""
        return self._load(self.recipe.restricted)

    @cached_property
    def halves(self) -> tuple[ImageData, ImageData]:
        """The defender's and the adversary's training data of the restricted domain."""
        return self.restricted.halves(self.recipe.seed)

    def adversary_data(self, seed: int) -> ImageData:
        """What the adversary of one audit seed has: a draw from its half."""
        return sample(self.halves[1], self.recipe.restricted.adversary, derive(self.recipe.seed, "adversary", seed))

    def check(self) -> None:
        """Read all data and build the model once, so that bad input is found before any work and any file."""
        sample(self.halves[1], self.recipe.restricted.adversary, 0)  # raises where there are too few
        ours, theirs = len(self.head_classes), len(self.restricted.classes)
        model = self.architecture.build(ours)
        self.task.check(model, self.architecture.example())
        if self.task.generates:
            check_exhibits(self.restricted.test)
        heads = self.architecture.head(model, ours)
        weights = self.weights
        if weights == "timm":
            self.architecture.build(ours, pretrained=True)
        for path in (weights, self.protected):
            if path and path != "timm":
                models.load_state(model, read_weights(path, self.architecture))
        if not self.protected:
            shared = self.recipe.runtime.shard and current().count > 1  # perhaps too large for one device
            model = model if shared else self.runtime.place(model)
            self.recipe.defence_object.check(self.given(model), build=not shared)
        self._check_apart()
        learner = self.architecture.build(theirs)
        for attack in self.recipe.audit.attacks:  # a battery's that do not fit are left out, and named
            attack.tuning.fresh_layers(learner, self.architecture, theirs)
        every = self.recipe.audit.all_attacks()
        require(
            not heads or ours == theirs or not all(a.keeps_head for a in every),
            "head and classes do not agree, and every attack of the audit keeps the head",
        )
        if self.recipe.benign:
            _ = self.benign_ground

    @cached_property
    def head(self) -> list[str]:
        """Names of the head's layers; none for a model without classes."""
        classes = len(self.head_classes)
        return self.architecture.head(self.architecture.build(classes), classes)

    def given(self, model: nn.Module) -> Given:
        """What a defence is given, with `model` for the original classes on the device."""
        theirs = len(self.restricted.classes)
        seed = self.recipe.seed
        return Given(model, self.original, self.halves[0], theirs, self.architecture, self.task, self.runtime, seed)

    def _check_apart(self) -> None:
        """The same classes of the same source cannot be kept and restricted at once."""
        if not self.with_original:
            return
        specs = (self.recipe.original, self.recipe.restricted)
        sources = [{parse_selection(p)[0] for p in parts_of(d.data)} for d in specs]
        both = sorted(set(self.original.classes) & set(self.restricted.classes))
        shared = sources[0] & sources[1]
        require(
            not shared or not both,
            f"{', '.join(both[:5])} of {', '.join(sorted(shared))} is both kept and restricted; choose classes that "
            "differ",
        )

    @cached_property
    def benign(self) -> Domain | None:
        """The third domain, to which fine-tuning should stay possible; None where the recipe names none."""
        spec = self.recipe.benign
        return self._load(spec) if spec else None

    @cached_property
    def benign_ground(self) -> Ground | None:
        """The third domain for fine-tuning: as many images as the adversary has of the restricted one."""
        if self.benign is None:
            return None
        most = min(len(self.adversary_data(0)), len(self.benign.train))
        return self._ground(self.benign, self.benign.train, most, "benign")

    def _ground(self, domain: Domain, data: ImageData, count: int | None, stream: str) -> Ground:
        train = tuple(sample(data, count, derive(self.recipe.seed, stream, s)) for s in self.seeds)
        return Ground(train, domain.validation, domain.test, len(domain.classes))

    @property
    def seeds(self) -> range:
        """The audit's seeds."""
        return range(self.recipe.audit.seeds)

    def bench(self, states: Mapping[str, State]) -> Bench:
        """What all cells of the audit share; `states`: the protected and the clean weights."""
        spec = self.recipe.restricted
        healing: tuple[ImageData, ...] = ()
        if self.with_original:
            data = self.original.train
            count = max(len(self.original.classes), round(HEALING_SHARE * len(data)))
            healing = tuple(sample(data, count, derive(self.recipe.seed, "healing", s)) for s in self.seeds)
        return Bench(
            states,
            self.architecture,
            len(self.head_classes),
            self._ground(self.restricted, self.halves[1], spec.adversary, "adversary"),
            self.measured,
            self.runtime,
            self.recipe.audit.steps,
            self.recipe.audit.evaluations,
            "",
            healing,
            self.benign_ground,
        )

    @cached_property
    def head_classes(self) -> tuple[str, ...]:
        """The classes of the model's head: the original domain's; without one, as many as the given weights have."""
        if self.with_original:
            return self.original.classes
        state = read_weights(self.weights or "", self.architecture)
        classes = len(self.restricted.classes)
        heads = self.architecture.head(self.architecture.build(classes), classes)
        table = state.get(f"{heads[-1]}.weight") if heads else None
        rows = classes if table is None else len(table)
        return tuple(map(str, range(rows)))

    def identity(self) -> dict[str, Any]:
        """What makes this run this run, for its folder."""
        recipe = self.recipe.as_dict()
        for name in ("jobs", "ray"):  # who shares the work changes no result
            recipe["runtime"].pop(name)
        identity: dict[str, Any] = {"recipe": recipe}
        if self.protected:
            identity["protected"] = str(Path(self.protected).expanduser().resolve())
        return identity

    @cached_property
    def content(self) -> dict[str, Any]:
        """Hashes of what the run rests on: the data as decoded, and weights that were given. Paths alone do not tell
        whether a resumed run still has what it began with."""
        files = {"weights": self.weights, "protected": self.protected}
        given = {n: Path(p).expanduser() for n, p in files.items() if p and p != "timm"}
        specs = {"restricted": self.recipe.restricted}
        specs |= {"original": self.recipe.original} if self.with_original else {}
        specs |= {"benign": self.recipe.benign} if self.recipe.benign else {}
        domains = {n: self._decoded(s) for n, s in specs.items()}
        return {
            **{n: sha256_file(find_weights(p) if p.is_dir() else p) for n, p in given.items()},
            **{
                f"{n} {part}": getattr(d, part).sha256()
                for n, d in domains.items()
                for part in ("train", "validation", "test")
            },
        }

    @property
    def work_identity(self) -> str:
        """The name that checkpoints carry; they know neither audit seeds nor battery, of which there may be more when
        work goes on."""
        identity = self.identity()
        for name in ("seeds", "battery"):
            identity["recipe"]["audit"].pop(name)
        return fingerprint({**identity, "content": self.content})

    def facts(self, attacks: Sequence[Attack], left_out: Mapping[str, str]) -> dict[str, Any]:
        """What a reader of the records needs to know: data, seeds, battery, attacks, hashes."""
        test = self.restricted.test.labels
        return {
            "run_seed": self.recipe.seed,
            "foreign": bool(self.protected),
            "audit_seeds": list(self.seeds),
            "battery": battery(self.recipe.audit.battery).title,
            "left_out": dict(left_out),
            "attacks": {a.name: attack_facts(a) for a in attacks},
            "content_sha256": self.content,
            "model": {n: getattr(self.architecture, n) for n in ("name", "size", "channels", "mean", "std")}
            | {"options": dict(self.architecture.options)},
            "restricted": {
                "data": self.restricted.name,
                "classes": list(self.restricted.classes),
                "chance": self.measured.chance(test),
                "defender": len(self.halves[0]),
                "adversary": len(self.adversary_data(0)),
                "validation": len(self.restricted.validation),
                "test": len(test),
                "duplicates_dropped": self.restricted.dropped,
            },
            "benign": {
                "data": self.benign.name,
                "classes": list(self.benign.classes),
                "chance": self.measured.chance(self.benign.test.labels),
                "train": len(self.benign_ground.train[0]),
                "test": len(self.benign.test),
            }
            if self.benign and self.benign_ground
            else None,
            "original": {
                "data": self.original.name,
                "classes": list(self.original.classes),
                "train": len(self.original.train),
                "validation": len(self.original.validation),
                "test": len(self.original.test),
                "duplicates_dropped": self.original.dropped,
            }
            if self.with_original
            else None,
        }
