"""The audit: protected, clean and from-scratch models under the same attacks, data, budget and seeds.

First the searches (`searches`: one a model and attack that has something to search), then the cells: one model under
one attack with one seed. Both are independent of each other, run in parallel, and are appended whole to
`searches.jsonl` and `records.jsonl`, so an audit that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from holdfast.attacks.attack import Attack
from holdfast.attacks.batteries import battery
from holdfast.attacks.released import ORIGINAL_DATA, THIRD_DOMAIN, Released
from holdfast.cells import Bench, CellSpec, End, run_cell
from holdfast.errors import require
from holdfast.finetuning import FineTuning
from holdfast.progress import Reporter
from holdfast.records import Cell, LineFile, Record, RecordFile, SearchRecord
from holdfast.search import resolved
from holdfast.workers import run_all

MODELS = ("protected", "clean", "scratch")
BENIGN = "benign domain · initFC+all · adam 1e-3"  # fine-tuning to the third domain, which should stay possible
PAPER_DEFAULT = "direct+all"  # the name of SOPHON's default attack, which the report and the exhibits speak of
HEALING_SHARE = 0.1  # of the original training data, for attackers who have some (TransNTL: less than 10 %)


@dataclass(frozen=True)
class AuditSpec:
    """What is run: a battery (or extra `attacks`), the budget in optimiser `steps`, `seeds` (0 … n−1), and how often
    curves are measured (`evaluations` steps that double up to the last)."""

    battery: str = "quick"
    steps: int = 300
    seeds: int = 3
    evaluations: int = 8
    attacks: tuple[Attack, ...] = ()
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        battery(self.battery)
        for name, least in (("steps", 2), ("seeds", 1), ("evaluations", 2)):
            require(getattr(self, name) >= least, f"{name} must be at least {least}, but got {getattr(self, name)}")
        for attack in self.attacks:
            require(
                attack.budget == 1 or attack.tuning.steps == FineTuning.steps,
                f"attack '{attack.name}': give either its tuning's steps or a budget",
            )
        names = [a.name for a in self.all_attacks()]
        require(bool(names), "the battery 'own' has no attacks but the recipe's; give audit.attacks")
        require(len(set(names)) == len(names), f"two attacks have the same name: {', '.join(sorted(names))}")

    def all_attacks(self) -> tuple[Attack, ...]:
        """The battery's attacks within the budget, then the recipe's own: those that say how many steps they take as
        they are, the others within the budget."""
        own = (a.within(self.steps) if a.tuning.steps == FineTuning.steps else a for a in self.attacks)
        return (*battery(self.battery).within(self.steps), *own)


def applicable(attacks: Sequence[Attack], bench: Bench) -> tuple[list[Attack], dict[str, str]]:
    """The attacks that can be run on the bench's models, and why each of the others cannot."""
    chosen, left_out = [], {}
    released = [Released(bench.architecture, s, bench.head_classes) for s in bench.states.values()]
    for attack in attacks:
        why = None
        if attack.keeps_head and released[0].head() and bench.head_classes != bench.restricted.classes:
            why = "keeps the head, and the domains differ in number of classes"
        elif ORIGINAL_DATA in attack.needs and not bench.original:
            why = "needs original data, and there is no original domain"
        elif THIRD_DOMAIN in attack.needs and bench.benign is None:
            why = "needs a third domain; name one as `benign`"
        # What one of the models cannot have, the other may: pruned weights, say.
        obstacles = [attack.obstacle(r) for r in released]
        why = why or (obstacles[0] if all(obstacles) else None)
        if why:
            left_out[attack.name] = why
        else:
            chosen.append(attack.fitted(released[0]))
    return chosen, left_out


def by_reason(left_out: Mapping[str, str]) -> str:
    """Attacks that were not run, each reason said once: `a, b (why); c (another)`."""
    found: dict[str, list[str]] = {}
    for name, why in left_out.items():
        found.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(names)} ({why})" for why, names in found.items())


def plan_cells(
    attacks: Sequence[Attack],
    seeds: int,
    chosen: Mapping[tuple[str, str], dict[str, Any]],
    simulates: Callable[[FineTuning, Sequence[Any]], bool],
) -> list[CellSpec]:
    """Every cell of the grid attacks × seeds × models. `chosen`: what the searches found, by (model, attack).

    From-scratch runs with the same optimisation are one cell. `simulates`: whether the defence trained against a tuning
    after these edits.
    """

    def final(model: str, attack: Attack) -> tuple[Attack, dict[str, Any] | None]:
        setting = chosen.get((model, attack.name))
        plain = attack.control() if model == "scratch" else attack
        return (resolved(plain, setting) if setting else plain), setting

    specs = []
    for seed in range(seeds):
        for attack in attacks:
            ours, _ = final("protected", attack)
            known = simulates(ours.tuning, ours.edits)
            for model in ("protected", "clean"):
                tuned, setting = final(model, attack)
                specs.append(CellSpec(model, tuned, (attack.name,), (known,), seed, (setting,)))
        controls: dict[Attack, list[tuple[str, bool, dict[str, Any] | None]]] = {}
        for attack in attacks:
            ours, _ = final("protected", attack)
            known = simulates(ours.tuning, ours.edits)
            control, setting = final("scratch", attack)
            controls.setdefault(replace(control, budget=1.0), []).append((attack.name, known, setting))
        for control, group in controls.items():
            names, flags, settings = zip(*group, strict=True)
            specs.append(CellSpec("scratch", control, names, flags, seed, settings))
    return specs


def plan_benign(steps: int, seeds: int, head: bool = True) -> list[CellSpec]:
    """Fine-tuning to the third domain, three models; `head`: whether they have one to re-initialise."""
    tuning = FineTuning.named(
        "initFC+all" if head else "direct+all", optimiser="adam", lr=1e-3, weight_decay=0.0, steps=steps
    )
    attack = Attack(BENIGN, tuning)
    return [
        CellSpec(m, attack.control() if m == "scratch" else attack, (BENIGN,), (False,), seed, benign=True)
        for seed in range(seeds)
        for m in MODELS
    ]


@dataclass(frozen=True)
class AuditFiles:
    """Where an audit's results are kept, in a run's folder."""

    folder: Path

    @property
    def records(self) -> RecordFile:
        """`records.jsonl`."""
        return RecordFile(self.folder / "records.jsonl")

    @property
    def searches(self) -> LineFile[SearchRecord]:
        """`searches.jsonl`."""
        return LineFile(self.folder / "searches.jsonl", SearchRecord)


def run_audit(
    specs: Sequence[CellSpec],
    bench: Bench,
    file: RecordFile,
    reporter: Reporter,
    jobs: int | None = None,
    ray: str | None = None,
    kept: Callable[[End], None] = lambda _: None,
) -> None:
    """Run the cells that `file` lacks; see `workers.run_all` for `jobs` and `ray`. `kept` is given the models that are
    to be kept, before their records are written."""
    done = _current(specs, file)
    done |= _shared(specs, file, done)
    left = [s for s in specs if not all((s.model, name, s.seed) in done for name in s.names)]
    if not left:
        return
    with reporter.bar("audit", len(specs), len(specs) - len(left)) as bar:
        for found in run_all(run_cell, bench, left, jobs, ray):
            if found.end is not None:
                kept(found.end)
            fresh = [r for r in found.records if (r.model, r.attack, r.seed) not in done]
            file.append(fresh)
            done |= {(r.model, r.attack, r.seed) for r in fresh}  # a cell that came twice counts once
            last = next(r for r in reversed(found.records) if r.split == "test")
            scale = bench.task.scale
            bar.advance(f"{last.model} · {last.attack} · seed {last.seed}: {scale.name} {scale.shown(last.value)}")


def _current(specs: Sequence[CellSpec], file: RecordFile) -> set[Cell]:
    """The whole cells in `file`, without those that were measured at another setting than `specs` have: of a smaller
    battery, whose searches had chosen otherwise. What is kept says whether the attack, as it is now, was simulated."""
    done = file.recover()
    now = {(s.model, name, s.seed): (flag, setting) for s in specs for name, flag, setting in s.named()}
    records, stale = [], set()
    for record in file.read():
        cell = record.model, record.attack, record.seed
        flag, setting = now.get(cell, (record.simulated, record.setting))
        if setting == record.setting:
            records.append(replace(record, simulated=flag))
        else:
            stale.add(cell)
    file.keep(records)
    return done - stale


def _shared(specs: Sequence[CellSpec], file: RecordFile, done: Set[Cell]) -> set[Cell]:
    """Copy from-scratch records that an audit by a smaller battery has under some of a cell's names to the others;
    returns the cells that are whole by it."""
    copied: list[Record] = []
    records = file.read()
    for spec in specs:
        new = [i for i, n in enumerate(spec.names) if (spec.model, n, spec.seed) not in done]
        if 0 < len(new) < len(spec.names):
            there = next(n for n in spec.names if (spec.model, n, spec.seed) in done)
            found = [r for r in records if (r.model, r.attack, r.seed) == (spec.model, there, spec.seed)]
            for name, flag, setting in (spec.named()[i] for i in new):
                copied += [replace(r, attack=name, simulated=flag, setting=setting) for r in found]
    if copied:
        file.append(copied)
    return {(r.model, r.attack, r.seed) for r in copied}
