"""The chain pre-train → protect → audit → report over one output folder, resumable at every stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from holdfast import models
from holdfast.attacks.batteries import battery, lies_within
from holdfast.audit import PAPER_DEFAULT, AuditFiles, applicable, by_reason, plan_benign, plan_cells, run_audit
from holdfast.bundle import Bundle, is_bundle, load_bundle, model_card, read_weights
from holdfast.checkpoints import Checkpoint
from holdfast.controls import adopt_cells, adopt_searches, check_controls, smaller
from holdfast.diffusion.exhibits import Show, keep_end, make_exhibits, marked
from holdfast.distributed import ALONE, Group, current
from holdfast.domains import public_name
from holdfast.errors import UserError, require
from holdfast.files import RunFolder, fingerprint, read_json, write_json
from holdfast.finetuning import FineTuning
from holdfast.inputs import Inputs
from holdfast.intactness import measure_intactness, parts
from holdfast.limits import probes, run_probes
from holdfast.models import Architecture, State, state_of
from holdfast.pretraining import pretrain
from holdfast.progress import Reporter
from holdfast.protection import defend
from holdfast.recipes import Recipe
from holdfast.records import provenance
from holdfast.runtime import peak_memory_mb, threads, threads_for
from holdfast.searches import plan_searches, run_searches
from holdfast.selfsupervised import pretrain_encoder
from holdfast.workers import released
from holdfast.workplace import Workplace

NOT_FOR_RELEASE = "# {}, before protection\n\nNot for release.\n"  # the clean model's card


@dataclass
class Run:
    """One recipe at work in one folder. Stages are methods; each leaves its files whole or not at all.

    `resume`: continue stages that have begun, with more audit seeds than before or as many, and with a battery that
    holds the one before; without it, a stage that has files is refused. `controls`: the folder of another run on the
    same data and clean weights, whose clean and from-scratch results are taken over. `shared`: a clean model to take
    instead of pre-training the same; neither is part of what makes the run this run. `group`: the processes that
    torchrun has started; they share pre-training and protection, and the first does what is left.
    """

    inputs: Inputs
    out: Path
    resume: bool = False
    reporter: Reporter = field(default_factory=lambda: Reporter(quiet=True))
    controls: Path | None = None
    shared: Path | None = None
    group: Group = field(default_factory=current)

    @property
    def bundle_folder(self) -> Path:
        """Where the protected model goes."""
        return self.out / "bundle"

    @property
    def clean_folder(self) -> Path:
        """Where the unprotected model is kept."""
        return self.out / "clean"

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Hold the folder as this run's own, or refuse it; nothing is written before all input could be read."""
        with ExitStack() as held:

            def hold() -> None:
                identity = self.inputs.identity()
                held.enter_context(RunFolder(self.out).claim(identity, self.resume, smaller(identity)))

            self.group.agreed(hold)
            yield

    @property
    def alone(self) -> Run:
        """The same run, as the first process goes on with it while others wait."""
        return replace(self, group=ALONE)

    def _check_fresh(self, stage: str, begun: bool) -> None:
        require(
            self.resume or not begun,
            f"{self.out} already holds this run's {stage}; add --resume to continue it, or choose another --out",
        )

    def pretrain(self) -> Bundle:
        """The clean model: loaded, or trained on the original domain; kept in `clean/`."""
        given = self.inputs
        found = self.group.agreed(self._clean_already)
        if found is not None:
            return found
        state = self._pretrained()
        details = {"stage": "clean", "content_sha256": self._learned_from()}
        bundle = Bundle(state, given.architecture, given.head_classes, details)
        self.group.agreed(lambda: bundle.save(self.clean_folder, NOT_FOR_RELEASE.format(given.recipe.name)))
        return bundle

    def _clean_already(self) -> Bundle | None:
        """The clean model that this folder has, or the shared one; None where it is to be made."""
        given = self.inputs
        if is_bundle(self.clean_folder):
            return self._clean(self.clean_folder)
        if self.shared is None:
            return None
        bundle = self._clean(self.shared)
        bundle.save(self.clean_folder, NOT_FOR_RELEASE.format(given.recipe.name))
        return bundle

    def _learned_from(self) -> dict[str, Any]:
        """Hashes of what the clean model comes from."""
        return {n: v for n, v in self.inputs.content.items() if n == "weights" or n.startswith("original ")}

    def _clean(self, folder: Path) -> Bundle:
        """A clean model made before; `UserError` where it comes from other content."""
        bundle, now = load_bundle(folder, self.inputs.architecture), self._learned_from()
        before = bundle.details.get("content_sha256", now)
        require(before == now, f"{folder} was made from other data or weights than there are now; choose another --out")
        return bundle

    def _pretrained(self) -> State:
        given, spec = self.inputs, self.inputs.recipe.self_supervised
        weights, start, group = given.weights, None, self.group
        if weights and weights != "timm":
            return group.agreed(lambda: read_weights(weights, given.architecture))
        path = self.out / "pretraining" / "checkpoint.pt"
        checkpoint = Checkpoint(path, given.work_identity, self.resume, self.reporter.say)
        group.agreed(lambda: self._check_fresh("pre-training", checkpoint.exists()))
        if weights == "timm":
            start = state_of(given.architecture.build(len(given.original.classes), pretrained=True))
        common = (given.architecture, given.original, given.recipe.pretrain)
        both = (given.task, given.runtime)
        kept: dict[str, Any] = {"seed": given.recipe.seed, "checkpoint": checkpoint, "reporter": self.reporter}
        with threads(self._threads(given.architecture.build(len(given.original.classes)))):
            if spec is None:
                return pretrain(*common, *both, start=start, group=group, **kept)
            # Contrast wants the whole batch in one place.
            return group.agreed(lambda: pretrain_encoder(*common, spec, *both, **kept))

    def _threads(self, model: nn.Module) -> int | None:
        return self.inputs.recipe.runtime.threads or threads_for(model, self.inputs.architecture.size)

    def protect(self) -> Bundle:
        """The protected model, in `bundle/`."""
        given = self.inputs
        found = self.group.agreed(self._protected_already)
        if found is not None:
            return found
        clean = self.pretrain()
        if given.protected:
            path, details = given.protected, {"defence": {"name": "unknown"}}
            state = self.group.agreed(lambda: read_weights(path, given.architecture))
            bundle = Bundle(state, given.architecture, clean.classes, details)
        else:
            bundle = self._defend(clean)
        self.group.agreed(lambda: bundle.save(self.bundle_folder, self._card(bundle, None)))
        return bundle

    def _protected_already(self) -> Bundle | None:
        there = is_bundle(self.bundle_folder)
        return load_bundle(self.bundle_folder, self.inputs.architecture) if there else None

    def _defend(self, clean: Bundle) -> Bundle:
        given, folder = self.inputs, self.out / "protection"
        workplace = Workplace(folder, self.resume, self.reporter, group=self.group)
        self.group.agreed(lambda: self._check_fresh("protection", workplace.begun()))
        intra_op = self._threads(given.architecture.build(len(clean.classes)))
        return defend(given, clean, folder, workplace, intra_op)

    def audit(self) -> None:
        """Every cell of the grid into `records.jsonl`."""
        self.protect()
        self.group.agreed(self.alone._audit)

    def _audit(self) -> None:
        given = self.inputs
        clean, protected = self.pretrain(), self.protect()
        files = AuditFiles(self.out)
        file = files.records
        self._check_fresh("audit", file.path.exists() or files.searches.path.exists())
        states = {"protected": protected.state, "clean": clean.state}
        bench = given.bench(states)
        attacks, left_out = applicable(given.recipe.audit.all_attacks(), bench)
        probing = battery(given.recipe.audit.battery).probes and given.task.labelled
        probed = probes(bench) if probing else []
        facts = self._facts({**given.facts(attacks, left_out), "probes": [a.name for a in probed]})
        good = check_controls(self.controls, given.recipe.as_dict(), facts) if self.controls else set()
        where = self._provenance(facts)
        bench = replace(bench, provenance=where)
        if left_out:
            self.reporter.say(f"left out: {by_reason(left_out)}")
        whole = file.recover()
        if given.with_original:
            known = {(m, n) for m, n, _ in whole}
            if not {(m, n) for m in states for n in parts(given.original, given.task)} <= known:
                about = (given.architecture, given.original, given.task, given.runtime, where)
                file.append(measure_intactness(states, *about, known))
        workers = (self.reporter, given.recipe.runtime.jobs, given.recipe.runtime.ray)
        seeds = given.recipe.audit.seeds
        with released():
            searches = plan_searches(attacks)
            taken = adopt_searches(self.controls, good, files, searches, where) if self.controls else 0
            chosen = run_searches(searches, bench, files.searches, *workers)
            cells = plan_cells(attacks, seeds, chosen, self._simulates())
            cells += plan_benign(given.recipe.audit.steps, seeds, bool(given.head)) if bench.benign else []
            taken += adopt_cells(self.controls, good, files, cells, where) if self.controls else 0
            if taken:
                self.reporter.say(f"audit: {taken} results of clean and scratch taken over from {self.controls}")
            exhibits = self.out / "exhibits"
            named = [a for a in attacks if a.name == PAPER_DEFAULT]
            shown = (named or attacks)[0] if given.task.generates else None
            cells = marked(cells, shown) if shown else cells
            run_audit(cells, bench, file, *workers, kept=partial(keep_end, exhibits))
            if probed:
                run_probes(bench, probed, seeds, file, self.reporter)
            if shown:
                show = Show(bench, given.original if given.with_original else None, given.decode)
                make_exhibits(show, shown, exhibits, *workers)
        self._note_memory()

    def _simulates(self) -> Callable[[FineTuning, Sequence[Any]], bool]:
        return (lambda *_: False) if self.inputs.protected else self.inputs.recipe.defence_object.simulates

    def _facts(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """What the records rest on: `about`, with versions, hardware and hashes."""
        given = self.inputs
        weights = {
            name: load_bundle(folder, given.architecture).details["weights_sha256"]
            for name, folder in (("clean", self.clean_folder), ("protected", self.bundle_folder))
        }
        return provenance(given.runtime, {**about, "weights_sha256": weights})

    def _provenance(self, facts: dict[str, Any]) -> str:
        """Write the facts to `provenance.json`; return their name there."""
        given = self.inputs
        name = fingerprint(facts)
        path = self.out / "provenance.json"
        known = read_json(path) if path.exists() else {}
        for before in known.values():
            changed = [n for n, v in before["content_sha256"].items() if given.content.get(n) != v]
            changed += [n for n, v in before["weights_sha256"].items() if facts["weights_sha256"].get(n) != v]
            require(
                not changed,
                f"{self.out} was audited on other content ({', '.join(changed)} changed since); records of both must "
                "not stand in one table: choose another --out",
            )
            theirs, ours = before["battery"], facts["battery"]
            require(
                lies_within(theirs, ours),
                f"{self.out} was audited by {theirs}, whose attacks are not all in {ours}; choose another --out",
            )
        known.pop(name, None)
        write_json(path, {**known, name: facts})  # the last one speaks for the audit as it is now
        return name

    def _note_memory(self) -> None:
        path = self.out / "audit.json"
        before = read_json(path)["peak_memory_mb"] if path.exists() else 0.0
        write_json(path, {"peak_memory_mb": max(before, peak_memory_mb(self.inputs.runtime.device))})

    def report(self) -> dict[str, Any]:
        """`summary.json`, `report.html`, `report.md` and the figures; the bundle's card gets the audit's figures."""
        return self.group.agreed(self._report)

    def _report(self) -> dict[str, Any]:
        from holdfast.report.write import write_report  # matplotlib takes a second to import: not in every worker

        summary = write_report(self.out)
        bundle = load_bundle(self.bundle_folder, self.inputs.architecture)
        bundle.save(self.bundle_folder, self._card(bundle, summary))
        return summary

    def _card(self, bundle: Bundle, summary: Mapping[str, Any] | None) -> str:
        given = self.inputs
        name = "an unknown defence" if given.protected else given.recipe.defence_name
        original = public_name(given.recipe.original.data) if given.with_original else "not given"
        return model_card(
            given.recipe.name, bundle, original, [public_name(given.recipe.restricted.data)], name, summary
        )

    def all(self) -> dict[str, Any]:
        """The whole chain; returns the summary."""
        self.inputs.check()
        with self.claim():
            self.audit()
            return self.report()


def run(recipe: Recipe, out: str | Path, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Pre-train where needed, protect, audit, report; returns the contents of `summary.json`."""
    return Run(Inputs(recipe), Path(out), resume, Reporter(quiet)).all()


def audit_checkpoint(
    recipe: Recipe, protected: str, out: str | Path, resume: bool = False, quiet: bool = False, original: bool = True
) -> dict[str, Any]:
    """Audit somebody's protected weights beside the clean ones (`recipe.weights`); returns the summary."""
    require(recipe.weights not in (None, "timm"), "an audit of a checkpoint needs the clean weights too: --clean FILE")
    return Run(Inputs(recipe, protected, original), Path(out), resume, Reporter(quiet)).all()


def load_model(folder: str | Path, architecture: Architecture | None = None) -> nn.Module:
    """The model of a bundle, with its weights, in evaluation mode. Raises `UserError` for a bundle that is torn."""
    if not is_bundle(Path(folder)):
        raise UserError(f"{folder} is no bundle (expected config.json and model.safetensors)")
    bundle = load_bundle(Path(folder), architecture)
    model = bundle.architecture.build(len(bundle.classes))
    models.load_state(model, bundle.state)
    return model.eval()
