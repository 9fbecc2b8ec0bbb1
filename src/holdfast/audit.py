"""The audit: protected, clean and from-scratch models under the same attacks, data, budget and seeds.

A cell is one model under one attack with one seed. Cells are independent, run in parallel processes, and are appended
to `records.jsonl` whole, so an audit that was killed goes on where it was.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from holdfast.attacks.batteries import Attack, battery
from holdfast.domains import Domain, ImageData
from holdfast.errors import require
from holdfast.finetuning import FineTuning
from holdfast.metrics import evaluation_steps
from holdfast.models import Architecture, State, load_state
from holdfast.progress import Reporter
from holdfast.records import Cell, Record, RecordFile
from holdfast.runtime import Runtime, threads
from holdfast.seeding import derive
from holdfast.tasks import Task
from holdfast.training import evaluate

MODELS = ("protected", "clean", "scratch")
ORIGINAL = "original domain"  # the "attack" under which intactness is recorded: none


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
        names = [a.name for a in self.all_attacks()]
        require(len(set(names)) == len(names), f"two attacks have the same name: {', '.join(sorted(names))}")

    def all_attacks(self) -> tuple[Attack, ...]:
        """The battery's attacks within the budget, then the recipe's own as they are."""
        return battery(self.battery).within(self.steps) + self.attacks


@dataclass(frozen=True)
class CellWork:
    """All that one cell needs, picklable. `attacks`: the names under which its records are kept (a from-scratch run
    serves every attack with the same optimisation)."""

    model: str
    attacks: tuple[str, ...]
    simulated: tuple[bool, ...]
    seed: int
    tuning: FineTuning
    evaluations: int
    state: State
    architecture: Architecture
    classes: int
    train: ImageData
    held_out: Mapping[str, ImageData]
    task: Task
    runtime: Runtime
    provenance: str


def run_cell(work: CellWork) -> list[Record]:
    """Initialise, fine-tune, evaluate along the way. An attack that diverges keeps its broken model to the end: the
    steps it did not make are recorded as that model's, marked `diverged`."""
    started = time.monotonic()
    model = work.runtime.place(work.architecture.build(work.classes, derive(work.seed, "build")))
    # Paired by construction: protected and clean share data order and new layers; scratch shares the data order.
    seed = derive(work.seed, "attack")
    work.tuning.initialise_from(model, work.state, work.architecture, work.classes, seed)
    steps = evaluation_steps(work.tuning.steps, work.evaluations)
    records: list[Record] = []
    batch = min(work.tuning.batch_size, len(work.train))

    def note(step: int, diverged: bool = False) -> None:
        for split, data in work.held_out.items():
            value, loss = evaluate(model, data, work.task, work.runtime)
            for name, simulated in zip(work.attacks, work.simulated, strict=True):
                records.append(
                    Record(
                        model=work.model,
                        attack=name,
                        seed=work.seed,
                        step=step,
                        last_step=work.tuning.steps,
                        split=split,
                        metric=work.task.metric,
                        value=value,
                        loss=loss if math.isfinite(loss) else None,
                        samples=step * batch,
                        seconds=round(time.monotonic() - started, 3),
                        simulated=simulated,
                        diverged=diverged,
                        provenance=work.provenance,
                    )
                )

    note(0)
    result = work.tuning.run(
        model,
        work.train,
        work.task,
        work.architecture,
        work.classes,
        runtime=work.runtime,
        seed=seed,
        after_step=lambda step, _: note(step) if step in steps else None,
    )
    for step in steps if result.diverged_at else []:
        if step >= (result.diverged_at or 0):
            note(step, diverged=True)
    return records


def plan_cells(
    attacks: Sequence[Attack],
    evaluations: int,
    states: Mapping[str, State],
    architecture: Architecture,
    domain: Domain,
    adversary: Sequence[ImageData],
    task: Task,
    runtime: Runtime,
    simulates: Callable[[FineTuning], bool],
    provenance: str,
) -> Iterator[CellWork]:
    """Every cell of the grid attacks × seeds × models. `adversary`: its data for each seed, the same for all models.
    From-scratch runs with the same optimisation are one cell."""
    common: dict[str, Any] = {
        "evaluations": evaluations,
        "architecture": architecture,
        "classes": len(domain.classes),
        "held_out": {"validation": domain.validation, "test": domain.test},
        "task": task,
        "runtime": runtime,
        "provenance": provenance,
    }
    controls: dict[FineTuning, list[Attack]] = {}
    for attack in attacks:
        controls.setdefault(attack.tuning.control(), []).append(attack)
    for seed, train in enumerate(adversary):
        for attack in attacks:
            known = (simulates(attack.tuning),)
            for model in ("protected", "clean"):
                yield CellWork(
                    model, (attack.name,), known, seed, attack.tuning, state=states[model], train=train, **common
                )
        for control, group in controls.items():
            names = tuple(a.name for a in group)
            seen = tuple(simulates(a.tuning) for a in group)
            yield CellWork("scratch", names, seen, seed, control, state={}, train=train, **common)


def run_audit(cells: Sequence[CellWork], records: RecordFile, reporter: Reporter, jobs: int | None = None) -> None:
    """Run the cells that `records` lacks, one thread a process, `jobs` processes (default: one a core on a CPU; one,
    in this process, on a GPU)."""
    done = records.recover()
    left = [c for c in cells if not _whole(c, done)]
    if not left:
        return
    on_cpu = left[0].runtime.device == "cpu"
    workers = min(len(left), jobs or os.cpu_count() or 1) if on_cpu else 1
    with reporter.bar("audit", len(cells), len(cells) - len(left)) as bar:
        for found in _results(left, workers):
            fresh = [r for r in found if (r.model, r.attack, r.seed) not in done]
            records.append(fresh)
            last = next(r for r in reversed(found) if r.split == "test")
            bar.advance(f"{last.model} · {last.attack} · seed {last.seed}: {last.metric} {last.value:.3f}")


def _whole(cell: CellWork, done: set[Cell]) -> bool:
    return all((cell.model, name, cell.seed) in done for name in cell.attacks)


def _results(cells: Sequence[CellWork], workers: int) -> Iterator[list[Record]]:
    if workers == 1:
        with threads(1 if cells[0].runtime.device == "cpu" else None):
            yield from map(run_cell, cells)
        return
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # inherited: threads that spin starve their neighbour
    parallel = Parallel(n_jobs=workers, return_as="generator_unordered", pre_dispatch="2*n_jobs", batch_size=1)
    yield from parallel(delayed(_single_threaded)(cell) for cell in cells)
    get_reusable_executor().shutdown(wait=True)  # only then is the workers' peak memory known


def _single_threaded(cell: CellWork) -> list[Record]:
    with threads(1):
        return run_cell(cell)


def measure_intactness(
    models: Mapping[str, State],
    architecture: Architecture,
    original: Domain,
    task: Task,
    runtime: Runtime,
    provenance: str,
) -> list[Record]:
    """Original-domain metric of the clean and the protected model, on validation and test data."""
    model: nn.Module = runtime.place(architecture.build(len(original.classes)))
    records = []
    for name, state in models.items():
        load_state(model, state)
        started = time.monotonic()
        for split, data in (("validation", original.validation), ("test", original.test)):
            value, loss = evaluate(model, data, task, runtime)
            records.append(
                Record(
                    model=name,
                    attack=ORIGINAL,
                    seed=0,
                    step=0,
                    last_step=0,
                    split=split,
                    metric=task.metric,
                    value=value,
                    loss=loss if math.isfinite(loss) else None,
                    samples=0,
                    seconds=round(time.monotonic() - started, 3),
                    simulated=False,
                    diverged=False,
                    provenance=provenance,
                )
            )
    return records
