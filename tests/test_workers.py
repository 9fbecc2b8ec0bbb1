"""Cells at work in several processes and on a real Ray: the same records, whoever computes them, whoever dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.attacks.attack import Attack
from holdfast.attacks.preparation import Heal
from holdfast.attacks.structure import LeakyActivations
from holdfast.audit import AuditFiles, applicable, plan_benign, plan_cells, run_audit
from holdfast.cells import Bench, CellSpec, run_cell
from holdfast.errors import UserError
from holdfast.finetuning import FineTuning
from holdfast.progress import Reporter
from holdfast.records import Record, RecordFile
from holdfast.searches import plan_searches, run_searches
from holdfast.workers import needed, released, run_all

ATTACKS = (
    Attack("plain", FineTuning("head", optimiser="adam", lr=1e-3, steps=6)),
    Attack("leaky", FineTuning("head", optimiser="adam", lr=1e-3, steps=6), (LeakyActivations(),)),
    Attack("healed", FineTuning("keep", optimiser="adam", lr=1e-3, steps=6), (Heal(),)),
)


def cells() -> list[CellSpec]:
    return plan_cells(ATTACKS, 2, {}, lambda *_: False) + plan_benign(6, 2)


def seen(records: Sequence[Record]) -> set[tuple[object, ...]]:
    return {(r.model, r.attack, r.seed, r.step, r.split, r.value, r.loss, r.samples, r.flops) for r in records}


def test_cells_are_sent_only_what_they_need(bench: Bench) -> None:
    plain, leaky, healed = (CellSpec("clean", a, (a.name,), (False,), 0) for a in ATTACKS)
    assert needed(bench, plain).original == ()
    assert needed(bench, plain).benign is None
    assert set(needed(bench, leaky).states) == {"clean"}
    assert needed(bench, healed).original[0] is bench.original[0]
    assert [len(d) for d in needed(bench, healed).original][1] == 0, "the other seed's"
    assert needed(bench, plan_benign(6, 1)[0]).benign is not None
    assert needed(bench, CellSpec("scratch", ATTACKS[0].control(), ("x",), (False,), 0)).states == {}


def test_scratch_runs_serve_every_attack_with_the_same_control() -> None:
    scratch = [c for c in cells() if c.model == "scratch" and c.seed == 0 and not c.benign]
    assert {c.names for c in scratch} == {("plain",), ("leaky",), ("healed",)}
    twins = (*ATTACKS, replace(ATTACKS[0], name="twin", tuning=replace(ATTACKS[0].tuning, train="lora")))
    scratch = [c for c in plan_cells(twins, 1, {}, lambda *_: False) if c.model == "scratch"]
    assert ("plain", "twin") in {c.names for c in scratch}


def test_two_processes_give_what_one_gives(bench: Bench) -> None:
    alone = [r for found in run_all(run_cell, bench, cells(), jobs=1) for r in found.records]
    together = [r for found in run_all(run_cell, bench, cells(), jobs=2) for r in found.records]
    assert seen(together) == seen(alone)
    assert len(together) == len(alone)


def dies_once(bench: Bench, spec: CellSpec) -> list[Record]:
    """The first worker that gets here is killed."""
    marker = Path(bench.provenance)
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return run_cell(bench, spec).records


def dies_always(bench: Bench, spec: CellSpec) -> list[Record]:
    """As if every cell were too large."""
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def test_a_process_that_is_killed_is_replaced(bench: Bench, tmp_path: Path) -> None:
    here = replace(bench, provenance=str(tmp_path / "killed"))
    found = [r for cell in run_all(dies_once, here, cells()[:4], jobs=2) for r in cell]
    assert (tmp_path / "killed").exists()
    assert seen(found) == seen([r for spec in cells()[:4] for r in run_cell(bench, spec).records])
    with pytest.raises(UserError, match="3 times a worker was killed"):
        list(run_all(dies_always, bench, cells()[:4], jobs=2))


def test_what_is_not_finite_when_evaluated_has_diverged(bench: Bench) -> None:
    """NaN in running statistics: training never sees it, and the model would look perfectly protected."""
    state = {n: v.clone() for n, v in bench.states["clean"].items()}
    state["1.running_mean"][:] = float("nan")
    poisoned = replace(bench, states={**bench.states, "protected": state})
    found = run_cell(poisoned, CellSpec("protected", ATTACKS[0], ("plain",), (False,), 0)).records
    assert all(r.diverged for r in found)
    whole = run_cell(bench, CellSpec("protected", ATTACKS[0], ("plain",), (False,), 0))
    assert not any(r.diverged for r in whole.records)
    assert whole.end is None


class Killer(threading.Thread):
    """Kills one of Ray's workers as soon as it is busy with one of our cells."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.killed: int | None = None

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while self.killed is None and time.monotonic() < deadline:
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit() and self.killed is None:
                    self.look_at(int(entry.name))
            time.sleep(0.02)

    def look_at(self, process: int) -> None:
        try:
            title = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:
            return
        if title.startswith(b"ray::") and b"holdfast_cell" in title:
            os.kill(process, signal.SIGKILL)
            self.killed = process


def test_a_real_ray_with_two_workers_of_which_one_is_killed(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    expected = [r for found in run_all(run_cell, bench, cells(), jobs=1) for r in found.records]
    killer = Killer()
    killer.start()
    file = RecordFile(tmp_path / "records.jsonl")
    with released():
        run_audit(cells(), bench, file, Reporter(quiet=True), jobs=2, ray="local")
    killer.join(timeout=1)
    assert killer.killed is not None, "no worker was seen at work"
    found = file.read()
    assert seen(found) == seen(expected)
    assert len(found) == len(expected), "nothing is recorded twice"


def test_a_ray_cluster_that_is_not_there(bench: Bench) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=r"cannot reach a Ray cluster at 'nowhere:1'.*expected auto, HOST:PORT"):
        list(run_all(run_cell, bench, cells(), ray="nowhere:1"))


def test_attacks_that_cannot_be_run_are_named_with_the_reason(bench: Bench) -> None:
    attacks = (
        *ATTACKS,
        Attack("regrown", FineTuning("head"), ("regrow",)),  # type: ignore[arg-type]
        Attack("benign", FineTuning("head"), ("benign-first",)),  # type: ignore[arg-type]
        Attack("deep", FineTuning("last-k", k=9)),
    )
    chosen, why = applicable(attacks, bench)
    assert [a.name for a in chosen] == ["plain", "leaky", "healed", "benign"]
    assert "no pruned weights" in why["regrown"]
    assert why["deep"].startswith("last-k needs k in [1, 5]")
    poor = replace(bench, original=(), benign=None, head_classes=7)
    assert applicable(attacks, poor)[1].keys() >= {"healed", "benign"}
    assert "differ in number of classes" in applicable(attacks, poor)[1]["healed"]


def test_a_torn_search_is_done_again_and_a_whole_one_is_not(bench: Bench, tmp_path: Path) -> None:
    from holdfast.attacks.attack import Search

    attack = replace(ATTACKS[0], search=Search(lr=(1e-3, 1e-2), extend=0))
    file = AuditFiles(tmp_path).searches
    specs = plan_searches([attack])
    assert [s.model for s in specs] == ["protected", "clean", "scratch"]
    chosen = run_searches(specs, bench, file, Reporter(quiet=True), jobs=1)
    assert set(chosen) == {(m, "plain") for m in ("protected", "clean", "scratch")}
    whole = file.path.read_bytes()
    first = whole.split(b"\n")[0] + b"\n"
    file.path.write_bytes(first + b'{"model": "cle')
    assert run_searches(specs, bench, file, Reporter(quiet=True), jobs=1) == chosen
    lines = file.path.read_bytes().splitlines()
    assert lines[0] + b"\n" == first
    assert len(lines) == 3
    final = plan_cells([attack], 1, chosen, lambda t, _: t.lr == chosen["protected", "plain"]["lr"])
    assert [c.settings for c in final] == [({"lr": c.attack.tuning.lr},) for c in final]
    assert all(c.attack.search is None for c in final)
    assert final[0].simulated == (True,)


def test_what_attacks_of_a_larger_battery_share_with_a_smaller_one_is_copied(bench: Bench, tmp_path: Path) -> None:
    """One control serves both attacks; with the first one's at hand, that of the second is not measured again."""
    from holdfast.attacks.attack import Search

    first = replace(ATTACKS[0], search=Search(lr=(1e-3, 1e-2), extend=0))
    twin = replace(first, name="twin", tuning=replace(first.tuning, train="lora"))
    files, quiet = AuditFiles(tmp_path), Reporter(quiet=True)
    for attacks in ([first], [first, twin]):
        chosen = run_searches(plan_searches(attacks), bench, files.searches, quiet, jobs=1)
        run_audit(plan_cells(attacks, 1, chosen, lambda *_: False), bench, files.records, quiet, jobs=1)
    searches = [s for s in files.searches.read() if s.model == "scratch"]
    assert [s.attacks for s in searches] == [["plain", "twin"]], "one search, as in a fresh audit"
    scratch = [[r for r in files.records.read() if r.model == "scratch" and r.attack == n] for n in ("plain", "twin")]
    assert [replace(r, attack="plain") for r in scratch[1]] == scratch[0]
    assert len(scratch[0]) > 2
    assert {r.attack for r in files.records.read() if r.model == "protected"} == {"plain", "twin"}
