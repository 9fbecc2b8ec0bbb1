"""The chain pre-train → protect → audit → report over one output folder, resumable at every stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from holdfast import models
from holdfast.audit import measure_intactness, plan_cells, run_audit
from holdfast.bundle import Bundle, is_bundle, load_bundle, model_card
from holdfast.domains import Domain, ImageData, load_domain, sample
from holdfast.errors import UserError, require
from holdfast.files import RunFolder, fingerprint, read_json, write_json
from holdfast.finetuning import FineTuning
from holdfast.guard import Workplace
from holdfast.models import Architecture, State, load_weights, state_of
from holdfast.pretraining import pretrain
from holdfast.progress import Reporter, duration
from holdfast.recipes import Recipe
from holdfast.records import RecordFile, provenance
from holdfast.runtime import Runtime, peak_memory_mb, threads, threads_for
from holdfast.seeding import derive
from holdfast.tasks import Classification, Task


@dataclass
class Run:
    """One recipe at work in one folder. Stages are methods; each leaves its files whole or not at all.

    `protected`: somebody else's protected weights (file or bundle folder), to be audited instead of protecting.
    `resume`: continue stages that have begun; without it, a stage that has files is refused.
    """

    recipe: Recipe
    out: Path
    resume: bool = False
    reporter: Reporter = field(default_factory=lambda: Reporter(quiet=True))
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

    @property
    def bundle_folder(self) -> Path:
        """Where the protected model goes."""
        return self.out / "bundle"

    @property
    def clean_folder(self) -> Path:
        """Where the unprotected model is kept."""
        return self.out / "clean"

    def claim(self) -> None:
        """Make the folder this run's own, or refuse it; nothing is written before all data could be read."""
        RunFolder(self.out).claim(self._identity())

    def _identity(self) -> dict[str, Any]:
        recipe = self.recipe.as_dict()
        recipe["runtime"].pop("jobs")  # how many processes share the work changes no result
        identity: dict[str, Any] = {"recipe": recipe}
        if self.protected:
            identity["protected"] = str(Path(self.protected).expanduser().resolve())
        return identity

    def _check_fresh(self, stage: str, begun: bool) -> None:
        require(
            self.resume or not begun,
            f"{self.out} already holds this run's {stage}; add --resume to continue it, or choose another --out",
        )

    def preflight(self) -> None:
        """Read all data and build the model once, so that bad input is found before any work and any file."""
        if self.with_original:
            _ = self.original
        sample(self.halves[1], self.recipe.restricted.adversary, 0)  # raises where there are too few
        classes = len(self.original.classes if self.with_original else self.restricted.classes)
        model = self.architecture.build(classes)
        self.architecture.head(model, classes)
        weights = self.recipe.weights
        if weights and weights != "timm":
            models.load_state(model, load_weights(weights))
        if self.protected:
            models.load_state(model, load_weights(self.protected))
        if self.with_original:
            self._check_heads()

    def _check_heads(self) -> None:
        """Attacks and adversaries that keep the head need as many restricted as original classes."""
        ours, theirs = len(self.original.classes), len(self.restricted.classes)
        keeping = [a.name for a in self.recipe.audit.all_attacks() if a.tuning.initialise == "keep"]
        require(
            ours == theirs or not keeping,
            f"head and classes do not agree: {', '.join(keeping[:2])} keep the head, but the original domain has "
            f"{ours} classes and the restricted one {theirs}; choose equally many classes",
        )

    def pretrain(self) -> Bundle:
        """The clean model: loaded, or trained on the original domain; kept in `clean/`."""
        if is_bundle(self.clean_folder):
            return load_bundle(self.clean_folder, self.architecture)
        weights, start = self.recipe.weights, None
        checkpoint = self.out / "pretraining" / "checkpoint.pt"
        if weights == "timm":
            start = state_of(self.architecture.build(len(self.original.classes), pretrained=True))
        if weights and weights != "timm":
            state = load_weights(weights)
        else:
            self._check_fresh("pre-training", checkpoint.exists())
            with threads(self._threads(self.architecture.build(len(self.original.classes)))):
                state = pretrain(
                    self.architecture,
                    self.original,
                    self.recipe.pretrain,
                    self.task,
                    self.runtime,
                    seed=self.recipe.seed,
                    start=start,
                    checkpoint=checkpoint,
                    identity=fingerprint(self._identity()),
                    resume=self.resume,
                    reporter=self.reporter,
                )
        bundle = Bundle(state, self.architecture, self._head_classes(), {"stage": "clean", "source": weights})
        bundle.save(self.clean_folder, f"# {self.recipe.name}, before protection\n\nNot for release.\n")
        return bundle

    def _threads(self, model: nn.Module) -> int | None:
        return self.recipe.runtime.threads or threads_for(model, self.architecture.size)

    def _head_classes(self) -> tuple[str, ...]:
        return (self.original if self.with_original else self.restricted).classes

    def protect(self) -> Bundle:
        """The protected model, in `bundle/`."""
        if is_bundle(self.bundle_folder):
            return load_bundle(self.bundle_folder, self.architecture)
        clean = self.pretrain()
        if self.protected:
            details: dict[str, Any] = {"defence": {"name": "unknown"}, "source": self.protected}
            bundle = Bundle(load_weights(self.protected), self.architecture, clean.classes, details)
        else:
            bundle = self._defend(clean)
        bundle.save(self.bundle_folder, self._card(bundle, None))
        return bundle

    def _defend(self, clean: Bundle) -> Bundle:
        folder = self.out / "protection"
        self._check_fresh("protection", (folder / "checkpoint.pt").exists())
        model = self.runtime.place(self.architecture.build(len(clean.classes)))
        models.load_state(model, clean.state)
        defender, _ = self.halves
        started = time.monotonic()
        with threads(self._threads(model)):
            history = self.recipe.defence_object.protect(
                model,
                self.original,
                defender,
                restricted_classes=len(self.restricted.classes),
                architecture=self.architecture,
                task=self.task,
                runtime=self.runtime,
                seed=self.recipe.seed,
                identity=fingerprint(self._identity()),
                workplace=Workplace(folder, self.resume, self.reporter),
            )
        seconds = history.seconds or time.monotonic() - started
        memory = peak_memory_mb(self.runtime.device)
        write_json(
            folder / "history.json",
            {
                "seconds": seconds,
                "peak_memory_mb": memory,
                "rollbacks": history.rollbacks,
                "checks": history.checks,
            },
        )
        self.reporter.say(f"protect: done in {duration(seconds)}, {history.rollbacks} times gone back")
        name, fields = self.recipe.defence_name, self.recipe.as_dict()["defence"]
        details = {"defence": fields, "original": self.original.name, "restricted": self.restricted.name}
        return Bundle(state_of(model), self.architecture, clean.classes, {**details, "protected_with": name})

    def audit(self) -> None:
        """Every cell of the grid into `records.jsonl`."""
        clean, protected = self.pretrain(), self.protect()
        file = RecordFile(self.out / "records.jsonl")
        self._check_fresh("audit", file.path.exists())
        states = {"protected": protected.state, "clean": clean.state}
        where = self._provenance(states)
        cells = plan_cells(
            self.recipe.audit,
            states,
            self.architecture,
            self.restricted,
            [self.adversary_data(seed) for seed in range(self.recipe.audit.seeds)],
            self.task,
            self.runtime,
            self._simulates(),
            where,
        )
        whole = file.recover()
        if self.with_original and not any(attack == "original domain" for _, attack, _ in whole):
            file.append(measure_intactness(states, self.architecture, self.original, self.task, self.runtime, where))
        run_audit(list(cells), file, self.reporter, self.recipe.runtime.jobs)
        self._note_memory()

    def _simulates(self) -> Callable[[FineTuning], bool]:
        return (lambda _: False) if self.protected else self.recipe.defence_object.simulates

    def _provenance(self, states: Mapping[str, State]) -> str:
        """Write what the records rest on to `provenance.json`; return its name."""
        test = self.restricted.test.labels
        facts = provenance(
            self.runtime,
            {
                "run_seed": self.recipe.seed,
                "audit_seeds": list(range(self.recipe.audit.seeds)),
                "battery": self.recipe.audit.battery,
                "weights_sha256": {
                    name: (load_bundle(folder, self.architecture).details["weights_sha256"])
                    for name, folder in (("clean", self.clean_folder), ("protected", self.bundle_folder))
                    if name in states
                },
                "restricted": {
                    "data": self.restricted.name,
                    "classes": list(self.restricted.classes),
                    "chance": self.task.chance(test),
                    "defender": len(self.halves[0]),
                    "adversary": len(self.adversary_data(0)),
                    "validation": len(self.restricted.validation),
                    "test": len(test),
                    "duplicates_dropped": self.restricted.dropped,
                    "sha256": {"adversary": self.halves[1].sha256(), "test": self.restricted.test.sha256()},
                },
                "original": {
                    "data": self.original.name,
                    "classes": list(self.original.classes),
                    "train": len(self.original.train),
                    "validation": len(self.original.validation),
                    "test": len(self.original.test),
                    "duplicates_dropped": self.original.dropped,
                    "sha256": {"train": self.original.train.sha256(), "test": self.original.test.sha256()},
                }
                if self.with_original
                else None,
            },
        )
        name = fingerprint(facts)
        path = self.out / "provenance.json"
        known = read_json(path) if path.exists() else {}
        write_json(path, {**known, name: facts})
        return name

    def _note_memory(self) -> None:
        write_json(self.out / "audit.json", {"peak_memory_mb": peak_memory_mb(self.runtime.device)})

    def report(self) -> dict[str, Any]:
        """`summary.json`, `report.html`, `report.md` and the figures; the bundle's card gets the audit's figures."""
        from holdfast.report.write import write_report  # matplotlib takes a second to import: not in every worker

        summary = write_report(self.out)
        bundle = load_bundle(self.bundle_folder, self.architecture)
        bundle.save(self.bundle_folder, self._card(bundle, summary))
        return summary

    def _card(self, bundle: Bundle, summary: Mapping[str, Any] | None) -> str:
        name = "an unknown defence" if self.protected else self.recipe.defence_name
        original = self.recipe.original.data if self.with_original else "not given"
        return model_card(self.recipe.name, bundle, original, [self.recipe.restricted.data], name, summary)

    def all(self) -> dict[str, Any]:
        """The whole chain; returns the summary."""
        self.preflight()
        with RunFolder(self.out).lock():
            self.claim()
            self.pretrain()
            self.protect()
            self.audit()
            return self.report()


def run(recipe: Recipe, out: str | Path, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Pre-train where needed, protect, audit, report; returns the contents of `summary.json`."""
    return Run(recipe, Path(out), resume, Reporter(quiet)).all()


def audit_checkpoint(
    recipe: Recipe, protected: str, out: str | Path, resume: bool = False, quiet: bool = False, original: bool = True
) -> dict[str, Any]:
    """Audit somebody's protected weights beside the clean ones (`recipe.weights`); returns the summary."""
    require(recipe.weights not in (None, "timm"), "an audit of a checkpoint needs the clean weights too: --clean FILE")
    return Run(replace(recipe), Path(out), resume, Reporter(quiet), protected, original).all()


def load_model(folder: str | Path, architecture: Architecture | None = None) -> nn.Module:
    """The model of a bundle, with its weights, in evaluation mode. Raises `UserError` for a bundle that is torn."""
    if not is_bundle(Path(folder)):
        raise UserError(f"{folder} is no bundle (expected config.json and model.safetensors)")
    bundle = load_bundle(Path(folder), architecture)
    model = bundle.architecture.build(len(bundle.classes))
    models.load_state(model, bundle.state)
    return model.eval()
