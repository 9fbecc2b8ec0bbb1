"""What one model's search chose, all try: which settings are shared, and that they are seen to their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.attacks.attack import Attack, Search
from holdfast.attacks.structure import LeakyActivations
from holdfast.attacks.weights import Noise, Rebalance
from holdfast.audit import AuditFiles, plan_cells, run_audit
from holdfast.cells import Bench
from holdfast.files import fingerprint
from holdfast.finetuning import FineTuning
from holdfast.progress import Reporter
from holdfast.records import LineFile, SearchRecord
from holdfast.search import fitted, run_search
from holdfast.searches import Share, Shares, merged, plan_searches, run_searches

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


def answered(share: Share, finals: dict[float, float], lr: float) -> SearchRecord:
    """The record of a share whose tries ended at these values."""
    made = record(share.model, share.names, dict(finals), lr)
    return replace(made, told=list(share.told), before=fingerprint(share.before.trials))


def lacking(shares: Sequence[Share]) -> dict[tuple[str, str], list[float]]:
    return {(s.model, s.names[0]): [x["lr"] for x in s.told] for s in shares}


def uneven() -> list[SearchRecord]:
    """Protected was best at 3e-2, which clean gave up and scratch never tried; scratch at 1e-2, which all have."""
    return [
        record("protected", ["plain"], {1e-3: 0.3, 1e-2: 0.4, 3e-2: 0.6}, 3e-2),
        record("clean", ["plain"], {1e-3: 0.3, 1e-2: 0.7, 3e-2: None}, 1e-2),
        record("scratch", ["plain"], {1e-3: 0.3, 1e-2: 0.4}, 1e-2),
    ]


def test_what_a_model_gave_up_or_never_tried_of_what_another_chose() -> None:
    specs, known = plan_searches([PLAIN]), uneven()
    shares = Shares(specs, known).lacking
    assert lacking(shares) == {("clean", "plain"): [3e-2], ("scratch", "plain"): [3e-2]}
    clean = answered(shares[0], {3e-2: 0.9}, 3e-2)
    assert lacking(Shares(specs, [*known, clean]).lacking) == {("scratch", "plain"): [3e-2]}, "a kill changes nothing"
    assert len(Shares(specs, [*known, replace(clean, told=[{"lr": 0.1}])]).lacking) == 2, "told of something else"
    assert len(Shares(specs, [*known, replace(clean, before="x")]).lacking) == 2, "told after something else"


def test_what_was_chosen_of_what_was_told_is_told_on_until_all_is_even() -> None:
    specs, known = plan_searches([PLAIN]), uneven()
    clean, scratch = Shares(specs, known).lacking
    known += [answered(clean, {3e-2: 0.6}, 1e-2), answered(scratch, {3e-2: 0.5, 0.3: 0.8}, 0.3)]
    second = Shares(specs, known).lacking
    assert lacking(second) == {("protected", "plain"): [0.3], ("clean", "plain"): [0.3]}
    assert [t["setting"]["lr"] for t in second[1].before.trials] == [1e-3, 1e-2, 3e-2, 3e-2]
    known += [answered(s, {0.3: 0.5}, 1e-2) for s in second]
    assert Shares(specs, known).lacking == []


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
    assert lacking(Shares(specs, known).lacking) == {n: [3e-2] for n in lacks}


def test_a_setting_is_fitted_to_who_is_to_try_it() -> None:
    chains = ((), (Rebalance(),), (LeakyActivations(),), (Noise(0.1),), (Noise(0.5),))
    attack = replace(PLAIN, search=Search(trials=2, k=(2,), initialise=("last-k",), edits=chains))
    control = attack.control()
    theirs = {"lr": 0.1, "initialise": "last-k", "k": 2, "edits": "2: leaky"}
    assert fitted(theirs, attack, attack) == theirs
    assert fitted({**theirs, "edits": "4: noise"}, attack, attack) == {**theirs, "edits": "4: noise"}
    assert fitted(theirs, attack, control) == {"lr": 0.1, "edits": "1: leaky"}, "numbered among its own"
    assert fitted({**theirs, "edits": "1: rebalance"}, attack, control) == {"lr": 0.1, "edits": "0: none"}
    own = {"initialise": "head", "k": 1}
    assert fitted({"lr": 0.2, "edits": "1: leaky"}, control, attack) == {"lr": 0.2, **own, "edits": "2: leaky"}
    assert fitted({"lr": 0.2}, PLAIN, attack) == {"lr": 0.2, **own, "edits": "0: none"}


def test_one_record_a_search() -> None:
    known = uneven()
    share = Shares(plan_searches([PLAIN]), known).lacking[0]
    whole = merged([*known, replace(answered(share, {3e-2: 0.9}, 3e-2), edge=True)])
    assert [s.model for s in whole] == ["protected", "clean", "scratch"]
    clean = whole[1]
    assert [t["setting"]["lr"] for t in clean.trials] == [1e-3, 1e-2, 3e-2, 3e-2]
    assert (clean.chosen, clean.edge, clean.told, clean.before) == ({"lr": 3e-2}, True, [], "")
    assert (clean.steps, clean.samples, clean.flops, clean.seconds) == (36, 1800, 2e6, 4.0)


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
    assert all(s.told == [{"lr": 3e-2}] and s.provenance == "p" and s.steps == 6 for s in added.values())
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


def test_a_larger_battery_and_a_kill_end_as_one_run_does(bench: Bench, tmp_path: Path) -> None:
    """The same tries, choices and cells: after a smaller battery, and from every line on that a kill left."""
    wide = replace(PLAIN, search=Search(lr=(1e-4, 1e-3), extend=1))
    own = [
        record("protected", ["plain"], {1e-4: 0.3, 1e-3: 0.6}, 1e-3),
        record("clean", ["plain"], {1e-4: 0.4, 1e-3: None}, 1e-4),
        record("scratch", ["plain"], {1e-4: 0.3, 1e-3: None}, 1e-4),
    ]
    more = [
        record("protected", ["balanced"], {1e-4: 0.3, 1e-3: 0.5, 3e-2: 0.7}, 3e-2),
        record("clean", ["balanced"], {1e-4: 0.3, 1e-3: 0.6}, 1e-3),
    ]
    both = [wide, replace(BALANCED, search=wide.search)]

    def end(file: LineFile[SearchRecord], attacks: Sequence[Attack]) -> tuple[Any, list[SearchRecord]]:
        chosen = run_searches(plan_searches(attacks), bench, file, QUIET, jobs=1)
        found = [replace(s, seconds=0.0) for s in merged(file.read())]
        return chosen, sorted(found, key=lambda s: (s.model, s.attacks))

    fresh = AuditFiles(tmp_path / "fresh")
    grown = AuditFiles(tmp_path / "grown")
    for files in (fresh, grown):
        files.folder.mkdir()
    fresh.searches.append([*own[:2], replace(own[2], attacks=["plain", "balanced"]), *more])
    whole = end(fresh.searches, both)
    assert {s.model for s in fresh.searches.read() if s.told} == {"protected", "clean", "scratch"}
    grown.searches.append(own)
    end(grown.searches, both[:1])
    grown.searches.append(more)
    assert end(grown.searches, both) == whole
    lines = fresh.searches.path.read_bytes().splitlines(keepends=True)
    for count in range(5, len(lines)):
        grown.searches.path.write_bytes(b"".join(lines[:count]) + lines[count][:20])
        assert end(grown.searches, both) == whole


def test_where_what_was_shared_is_best_at_the_edge_the_search_goes_on(bench: Bench, tmp_path: Path) -> None:
    attack = replace(PLAIN, search=replace(PLAIN.search or Search(), extend=1))
    file = AuditFiles(tmp_path).searches
    low = {1e-5: 0.2, 1e-4: 0.2}
    file.append([record(m, ["plain"], low, 1e-4) for m in ("clean", "scratch")])
    file.append([record("protected", ["plain"], {**low, 1e-3: 0.6}, 1e-3)])
    run_searches(plan_searches([attack]), bench, file, QUIET, jobs=1)
    clean = next(s for s in file.read() if s.model == "clean" and s.told)
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


def test_each_name_of_a_shared_control_has_a_setting_of_its_own(bench: Bench, tmp_path: Path) -> None:
    """A search that chose what an attack without one has is served by that one's run; one that then chooses what
    another has, by the other's."""
    fixed = [replace(PLAIN, name=f"at {lr:g}", search=None, tuning=replace(PLAIN.tuning, lr=lr)) for lr in (1e-3, 1e-2)]
    file, attacks = AuditFiles(tmp_path).records, [*fixed, PLAIN]

    def curve(lr: float) -> list[list[float]]:
        chosen = {(m, "plain"): {"lr": lr} for m in ("protected", "clean", "scratch")}
        run_audit(plan_cells(attacks, 1, chosen, lambda *_: False), bench, file, QUIET, jobs=1)
        found = [[r for r in file.read() if r.model == "scratch" and r.attack == a.name] for a in attacks]
        assert [{str(r.setting) for r in f} for f in found] == [{"None"}, {"None"}, {str({"lr": lr})}]
        return [[r.value for r in f] + [r.loss or 0.0 for r in f] for f in found]

    first, second = curve(1e-3), curve(1e-2)
    assert first[2] == first[0]
    assert second[2] == second[1]
    assert first[:2] == second[:2]
    assert first[0] != first[1]
