"""What a run rests on: a recipe's data, model and attacks, read and checked before any work begins."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from holdfast import models
from holdfast.attacks.batteries import Attack, battery
from holdfast.bundle import WEIGHTS, read_weights
from holdfast.domains import Domain, ImageData, load_domain, parse_selection, sample
from holdfast.errors import require
from holdfast.files import fingerprint, sha256_file
from holdfast.models import Architecture
from holdfast.recipes import Recipe
from holdfast.runtime import Runtime
from holdfast.seeding import derive
from holdfast.tasks import Classification, Task


@dataclass
class Inputs:
    """A recipe, resolved as it is needed; every property is read once.

    `protected`: somebody else's protected weights (file or bundle folder), to be audited instead of protecting;
    `with_original`: whether there is an original domain (an audit of a checkpoint may lack it).
    """

    recipe: Recipe
    protected: str | None = None
    with_original: bool = True
    task: Task = field(default_factory=Classification)

    @cached_property
    def runtime(self) -> Runtime:
        """The resolved device and precision."""
        spec = self.recipe.runtime
        return Runtime.choose(spec.device, spec.precision, spec.compile)  # type: ignore[arg-type]

    @cached_property
    def architecture(self) -> Architecture:
        """The model, with the normalisation of timm's weights where those are used."""
        arch = self.recipe.model
        return models.with_pretrained_normalisation(arch) if self.recipe.weights == "timm" else arch

    @cached_property
    def original(self) -> Domain:
        """The original domain, on the device."""
        return load_domain(self.recipe.original, self.architecture.preprocessing, self.recipe.seed).to(self.runtime)

    @cached_property
    def restricted(self) -> Domain:
        """The restricted domain, on the device."""
        return load_domain(self.recipe.restricted, self.architecture.preprocessing, self.recipe.seed).to(self.runtime)

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
        self.architecture.head(model, ours)
        weights = self.recipe.weights
        if weights == "timm":
            self.architecture.build(ours, pretrained=True)
        for path in (weights, self.protected):
            if path and path != "timm":
                models.load_state(model, read_weights(path, self.architecture))
        if not self.protected:
            self.recipe.defence_object.check_classes(ours, theirs)
        self._check_apart()
        learner = self.architecture.build(theirs)
        for attack in self.attacks:
            attack.tuning.fresh_layers(learner, self.architecture, theirs)

    def _check_apart(self) -> None:
        """The same classes of the same source cannot be kept and restricted at once."""
        if not self.with_original:
            return
        names = [parse_selection(d.data)[0] for d in (self.recipe.original, self.recipe.restricted)]
        both = sorted(set(self.original.classes) & set(self.restricted.classes))
        require(
            names[0] != names[1] or not both,
            f"{', '.join(both[:5])} of {names[0]} is both kept and restricted; choose classes that differ",
        )

    @cached_property
    def attacks(self) -> tuple[Attack, ...]:
        """The audit's attacks; those that keep the head only where there are as many restricted classes."""
        found = self.recipe.audit.all_attacks()
        if len(self.head_classes) != len(self.restricted.classes):
            found = tuple(a for a in found if a.tuning.initialise != "keep")
        require(bool(found), "head and classes do not agree, and every attack of the audit keeps the head")
        return found

    @cached_property
    def head_classes(self) -> tuple[str, ...]:
        """The classes of the model's head: the original domain's; without one, as many as the given weights have."""
        if self.with_original:
            return self.original.classes
        state = read_weights(self.recipe.weights or "", self.architecture)
        classes = len(self.restricted.classes)
        head = self.architecture.head(self.architecture.build(classes), classes)[-1]
        rows = len(state[f"{head}.weight"]) if f"{head}.weight" in state else classes
        return tuple(map(str, range(rows)))

    def identity(self) -> dict[str, Any]:
        """What makes this run this run, for its folder."""
        recipe = self.recipe.as_dict()
        recipe["runtime"].pop("jobs")  # how many processes share the work changes no result
        identity: dict[str, Any] = {"recipe": recipe}
        if self.protected:
            identity["protected"] = str(Path(self.protected).expanduser().resolve())
        return identity

    @cached_property
    def content(self) -> dict[str, Any]:
        """Hashes of what the run rests on: the data as decoded, and weights that were given. Paths alone do not tell
        whether a resumed run still has what it began with."""
        files = {"weights": self.recipe.weights, "protected": self.protected}
        given = {n: Path(p).expanduser() for n, p in files.items() if p and p != "timm"}
        domains = {"restricted": self.restricted, **({"original": self.original} if self.with_original else {})}
        return {
            **{n: sha256_file(p / WEIGHTS if p.is_dir() else p) for n, p in given.items()},
            **{
                f"{n} {part}": getattr(d, part).sha256()
                for n, d in domains.items()
                for part in ("train", "validation", "test")
            },
        }

    @property
    def work_identity(self) -> str:
        """The name that checkpoints carry."""
        return fingerprint({**self.identity(), "content": self.content})

    def facts(self) -> dict[str, Any]:
        """What a reader of the records needs to know: data, seeds, battery, hashes."""
        test = self.restricted.test.labels
        return {
            "run_seed": self.recipe.seed,
            "audit_seeds": list(range(self.recipe.audit.seeds)),
            "battery": battery(self.recipe.audit.battery).title,
            "left_out": [a.name for a in self.recipe.audit.all_attacks() if a not in self.attacks],
            "content_sha256": self.content,
            "restricted": {
                "data": self.restricted.name,
                "classes": list(self.restricted.classes),
                "chance": self.task.chance(test),
                "defender": len(self.halves[0]),
                "adversary": len(self.adversary_data(0)),
                "validation": len(self.restricted.validation),
                "test": len(test),
                "duplicates_dropped": self.restricted.dropped,
            },
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
