"""What one model's search chose, all try: which settings are shared, and that they are seen to their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.attacks.attack import Attack, Search
from holdfast.attacks.structure import LeakyActivations
from holdfast.attacks.weights import Rebalance
from holdfast.audit import AuditFiles, plan_cells, run_audit
from holdfast.cells import Bench
from holdfast.finetuning import FineTuning
from holdfast.progress import Reporter
from holdfast.records import SearchRecord
from holdfast.search import fitted, run_search
from holdfast.searches import Share, merged, plan_searches, plan_shares, run_searches

PLAIN = Attack(
    "plain", FineTuning("head", optimiser="adam", lr=1e-3, steps=6), search=Search(lr=(1e-3, 1e-2, 3e-2), extend=0)
)
BALANCED = replace(PLAIN, name="balanced", edits=(Rebalance(),))
QUIET = Reporter(quiet=True)


def record(model: str, names: Sequence[str], finals: dict[float, float | None], lr: float) -> SearchRecord:
    """A search whose tries ended at these values; None: it was given up."""
    trials: list[dict[str, Any]] = [
        {"setting": {"lr": r}, "steps": [0, 3, 6], "values": [0.2, v or 0.2, v or 0.2], "pruned": v is None}
        for r, v in finals.items()
    ]
    return SearchRecord(model, list(names), trials, {"lr": lr}, False, 18, 900, 1e6, 2.0, "p")


def lacking(shares: Sequence[Share]) -> dict[tuple[str, str], list[float]]:
    return {(s.model, s.names[0]): [x["lr"] for x in s.settings] for s in shares}


def uneven() -> list[SearchRecord]:
    """Protected was best at 3e-2, which clean gave up and scratch never tried; scratch at 1e-2, which all have."""
    return [
        record("protected", ["plain"], {1e-3: 0.3, 1e-2: 0.4, 3e-2: 0.6}, 3e-2),
        record("clean", ["plain"], {1e-3: 0.3, 1e-2: 0.7, 3e-2: None}, 1e-2),
        record("scratch", ["plain"], {1e-3: 0.3, 1e-2: 0.4}, 1e-2),
    ]


def test_what_a_model_gave_up_or_never_tried_of_what_another_chose() -> None:
    specs, known = plan_searches([PLAIN]), uneven()
    assert lacking(plan_shares(specs, known)) == {("clean", "plain"): [3e-2], ("scratch", "plain"): [3e-2]}
    told = replace(record("clean", ["plain"], {3e-2: 0.9}, 3e-2), shared=True)
    assert lacking(plan_shares(specs, [*known, told])) == {("scratch", "plain"): [3e-2]}, "seen to its end"
    other = replace(record("clean", ["plain"], {0.1: 0.9}, 0.1), shared=True)
    assert ("clean", "plain") in lacking(plan_shares(specs, [*known, other])), "told of something else"


def test_attacks_with_one_control_share_what_any_of_them_chose() -> None:
    specs = plan_searches([PLAIN, BALANCED])
    own = {1e-3: 0.3, 1e-2: 0.6}
    known = [
        record("protected", ["plain"], own, 1e-2),
        record("clean", ["plain"], own, 1e-2),
        record("protected", ["balanced"], {1e-3: 0.6, 1e-2: 0.4}, 1e-3),
        record("clean", ["balanced"], {**own, 3e-2: 0.7}, 3e-2),
        record("scratch", ["plain", "balanced"], own, 1e-2),
    ]
    lacks = [("protected", "plain"), ("clean", "plain"), ("protected", "balanced"), ("scratch", "plain")]
    assert lacking(plan_shares(specs, known)) == {n: [3e-2] for n in lacks}
    # What was chosen of what was told (0.3, beyond the edge) is not told on.
    later = replace(record("scratch", ["plain", "balanced"], {3e-2: 0.9, 0.3: 0.95}, 0.3), shared=True)
    assert lacking(plan_shares(specs, [*known, later])) == {n: [3e-2] for n in lacks[:3]}


def test_a_setting_is_fitted_to_who_is_to_try_it() -> None:
    search = Search(trials=2, k=(2,), initialise=("last-k",), edits=((), (Rebalance(),), (LeakyActivations(),)))
    attack = replace(PLAIN, search=search)
    control = attack.control()
    theirs = {"lr": 0.1, "initialise": "last-k", "k": 2, "edits": "2: leaky"}
    assert fitted(theirs, attack) == theirs
    assert fitted(theirs, control) == {"lr": 0.1, "edits": "1: leaky"}, "numbered among its own"
    assert fitted({**theirs, "edits": "1: rebalance"}, control) == {"lr": 0.1, "edits": "0: none"}
    own = {"initialise": "head", "k": 1}
    assert fitted({"lr": 0.2, "edits": "1: leaky"}, attack) == {"lr": 0.2, **own, "edits": "2: leaky"}
    assert fitted({"lr": 0.2}, attack) == {"lr": 0.2, **own, "edits": "0: none"}


def test_one_record_a_search() -> None:
    known = uneven()
    more = replace(record("clean", ["plain"], {3e-2: 0.9}, 3e-2), shared=True, edge=True)
    whole = merged([*known, more])
    assert [s.model for s in whole] == ["protected", "clean", "scratch"]
    clean = whole[1]
    assert [t["setting"]["lr"] for t in clean.trials] == [1e-3, 1e-2, 3e-2, 3e-2]
    assert (clean.chosen, clean.edge, clean.shared) == ({"lr": 3e-2}, True, False)
    assert (clean.steps, clean.samples, clean.flops, clean.seconds) == (36, 1800, 2e6, 4.0)
    again = replace(record("clean", ["plain"], {3e-2: 0.9, 0.1: 0.95}, 0.1), shared=True)
    assert merged([*known, more, again]) == merged([*known, again]), "a larger battery had more to tell"


@pytest.fixture
def unfair(tmp_path: Path) -> AuditFiles:
    files = AuditFiles(tmp_path)
    files.searches.append(uneven())
    return files


def test_shared_tries_are_those_of_an_own_search(bench: Bench, unfair: AuditFiles) -> None:
    """Bit for bit, seen to their end, and the best of all is chosen; a second time nothing is left to do."""
    specs, file = plan_searches([PLAIN]), unfair.searches
    chosen = run_searches(specs, bench, file, QUIET, jobs=1)
    added = {s.model: s for s in file.read()[3:]}
    assert sorted(added) == ["clean", "scratch"]
    assert all(s.shared and s.provenance == "p" and s.steps == 6 for s in added.values())
    for spec in specs[1:]:
        alone = run_search(bench, replace(spec, attack=replace(spec.attack, search=Search(lr=(3e-2,), extend=0))))
        assert added[spec.model].trials == alone.trials
        assert not alone.trials[0]["pruned"]
    best = {"clean": 0.7, "scratch": 0.4}
    for model, before in best.items():
        end = added[model].trials[0]["values"][-1]
        assert chosen[model, "plain"]["lr"] == (3e-2 if end > before else 1e-2)
        assert added[model].chosen == chosen[model, "plain"]
    before = file.path.read_bytes()
    assert run_searches(specs, bench, file, QUIET, jobs=1) == chosen
    assert file.path.read_bytes() == before


def test_where_what_was_shared_is_best_at_the_edge_the_search_goes_on(bench: Bench, tmp_path: Path) -> None:
    attack = replace(PLAIN, search=replace(PLAIN.search or Search(), extend=1))
    file = AuditFiles(tmp_path).searches
    low = {1e-5: 0.2, 1e-4: 0.2}
    file.append([record(m, ["plain"], low, 1e-4) for m in ("clean", "scratch")])
    file.append([record("protected", ["plain"], {**low, 1e-3: 0.6}, 1e-3)])
    run_searches(plan_searches([attack]), bench, file, QUIET, jobs=1)
    clean = next(s for s in file.read() if s.model == "clean" and s.shared)
    assert [t["setting"]["lr"] for t in clean.trials] == pytest.approx([1e-3, 1e-2])
    assert clean.chosen == {"lr": max(clean.trials, key=lambda t: t["values"][-1])["setting"]["lr"]}


def test_a_cell_at_a_setting_that_is_no_longer_chosen_is_measured_anew(bench: Bench, tmp_path: Path) -> None:
    """And the others are not: their lines stay as they are."""
    files = AuditFiles(tmp_path)
    models = ("protected", "clean", "scratch")

    def audit(lr: float) -> None:
        chosen = {(m, "plain"): {"lr": lr if m == "scratch" else 1e-3} for m in models}
        run_audit(plan_cells([PLAIN], 2, chosen, lambda *_: False), bench, files.records, QUIET, jobs=1)

    audit(1e-3)
    first = files.records.read()
    audit(3e-2)
    second = files.records.read()
    assert [r for r in second if r.model != "scratch"] == [r for r in first if r.model != "scratch"]
    assert {r.setting["lr"] for r in second if r.model == "scratch" and r.setting} == {3e-2}
    assert len(second) == len(first)
    audit(3e-2)
    assert files.records.read() == second
