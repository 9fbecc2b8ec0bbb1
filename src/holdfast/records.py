"""Records: one JSON line for every evaluation, append-only, resumable cell by cell."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

from holdfast.errors import UserError, one_line, require
from holdfast.files import cannot_write, write_atomic
from holdfast.runtime import Runtime, hardware

VERSIONED = ("holdfast", "torch", "torchvision", "timm", "numpy", "safetensors", "scikit-learn", "optuna", "peft")


@dataclass(frozen=True)
class Record:
    """One evaluation of one model on its way through one attack.

    `value` is the metric on `split` (in [0, 1]) after `step` optimiser steps and `samples` training samples; `loss`
    the mean training loss there (None where it was not finite). `seconds`: time spent on this cell so far.
    `last_step`: the cell's final step, which tells a whole cell from a torn one. `provenance` names an entry of
    `provenance.json`.
    """

    model: str
    attack: str
    seed: int
    step: int
    last_step: int
    split: str
    metric: str
    value: float
    loss: float | None
    samples: int
    seconds: float
    simulated: bool
    diverged: bool
    provenance: str
    flops: float = 0.0  # of training so far, what edits spent included
    images: int = 0  # how many the attacker has
    setting: dict[str, Any] | None = None  # what a search chose; None where nothing was searched
    converged: bool = False  # stopped before: the training loss had gone
    dead: float = 0.0  # share of the trained weights before the head that the first step's gradient did not reach


@dataclass(frozen=True)
class SearchRecord:
    """All tries of one search: one model, and the attacks whose hyper-parameters it found (several share one control).

    Each of `trials` has `setting`, `steps`, `values` (metric on validation data at these steps) and `pruned`. `edge`:
    the chosen learning rate is the smallest or largest tried, and none between is as good. `told`: the tries
    begin with these settings, which other models' searches chose (`searches.run_searches`); `before` is the fingerprint
    of the tries that this model had made until then, which other records have, and `chosen` and `edge` are by all.
    """

    model: str
    attacks: list[str]
    trials: list[dict[str, Any]]
    chosen: dict[str, Any]
    edge: bool
    steps: int
    samples: int
    flops: float
    seconds: float
    provenance: str
    told: list[dict[str, Any]] = field(default_factory=list)
    before: str = ""


Cell = tuple[str, str, int]
T = TypeVar("T", bound=Record | SearchRecord)


class LineFile(Generic[T]):
    """JSON lines of one kind, appended and synchronised; a torn last line is passed over."""

    def __init__(self, path: Path, kind: Callable[..., T]) -> None:
        self.path, self.kind = path, kind

    def read(self) -> list[T]:
        """All records in the file. A torn last line is passed over; anything else that is no record is an error."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        lines.pop()  # empty where the last line is whole, else torn
        return [self._parse(line, number) for number, line in enumerate(lines, start=1) if line.strip()]

    def _parse(self, line: bytes, number: int) -> T:
        try:
            return self.kind(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path}, line {number}: not a record of this version: {one_line(error)}") from None

    def keep(self, records: Sequence[T]) -> None:
        """Make these the file's contents, rewriting it only where they are not yet."""
        text = "".join(_line(r) for r in records)
        if self.path.exists() and self.path.read_text(errors="replace") != text:
            write_atomic(self.path, text)

    def append(self, records: Sequence[T]) -> None:
        """Add records and wait for the disk."""
        try:
            with self.path.open("a") as file:
                file.write("".join(_line(r) for r in records))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error


class RecordFile(LineFile[Record]):
    """`records.jsonl`. Cells are appended whole; after a crash, what is torn is dropped and done again."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Record)

    def recover(self) -> set[Cell]:
        """Drop torn lines and cells; return the cells that are whole."""
        records = self.read()
        whole = {(r.model, r.attack, r.seed) for r in records if r.step == r.last_step and r.split == "test"}
        self.keep([r for r in records if (r.model, r.attack, r.seed) in whole])
        return whole


def _line(record: Record | SearchRecord) -> str:
    return json.dumps(asdict(record), allow_nan=False) + "\n"


def provenance(runtime: Runtime, extra: dict[str, Any]) -> dict[str, Any]:
    """Versions, source revision and hardware, with `extra` (seeds, hashes of weights and data …)."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONED},
        "revision": source_revision(),
        "hardware": hardware(runtime),
        **extra,
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def source_revision() -> str:
    """Commit of the source tree that this package runs from, `+` where it has changes; `release` elsewhere."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return "release"
    try:
        run = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def curves(records: Iterable[Record], model: str, attack: str, split: str) -> tuple[list[int], list[int], Any]:
    """Steps (S,), seeds (R,) and values (R, S) of one model under one attack."""
    chosen = [r for r in records if (r.model, r.attack, r.split) == (model, attack, split)]
    steps, seeds = sorted({r.step for r in chosen}), sorted({r.seed for r in chosen})
    table = {(r.seed, r.step): r.value for r in chosen}
    require(
        len(table) == len(steps) * len(seeds),
        f"records of {model} under {attack} are incomplete: {len(table)} of {len(steps) * len(seeds)}",
    )
    return steps, seeds, [[table[s, k] for k in steps] for s in seeds]
