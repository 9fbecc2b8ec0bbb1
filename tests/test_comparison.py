"""Several defences in one table: one clean model, controls measured once, figures that are the runs' own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from holdfast.attacks.attack import Attack, Search
from holdfast.audit import AuditFiles
from holdfast.comparison import check_comparison, plan_comparison, presets_of, run_comparison
from holdfast.controls import adopt_searches
from holdfast.domains import Domain, DomainSpec, load_domain
from holdfast.errors import UserError
from holdfast.finetuning import FineTuning
from holdfast.inputs import Inputs, Pixels
from holdfast.intactness import ORIGINAL
from holdfast.pipeline import Run
from holdfast.preprocessing import Preprocessing
from holdfast.recipes import load_recipe
from holdfast.records import SearchRecord
from holdfast.report.compare import as_markdown, write_comparison
from holdfast.report.frontier import in_order
from holdfast.searches import plan_searches


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe with two presets."""
    recipe: dict[str, Any] = {
        "name": "several",
        "original": {"data": "digits[0-4]", "per_class": 60, "test_per_class": 20},
        "restricted": {"data": "digits[5-9]", "per_class": 60, "test_per_class": 20},
        "model": {"name": "small_conv", "size": 8, "channels": 1, "options": {"width": 8}},
        "pretrain": {"steps": 60, "batch_size": 50, "lr": 0.005},
        "audit": {
            "battery": "own",
            "steps": 8,
            "seeds": 2,
            "evaluations": 3,
            "attacks": [
                {"name": "plain", "tuning": {"initialise": "head", "optimiser": "adam", "lr": 0.01}},
                {
                    "name": "searched",
                    "tuning": {"initialise": "head", "optimiser": "adam"},
                    "search": {"lr": [1e-3, 1e-2]},
                },
            ],
        },
        "runtime": {"precision": "float32", "jobs": 1},
        "presets": {
            "identity": {"defence": "identity"},
            "ntl": {"defence": {"name": "ntl", "iterations": 10, "check_every": 5, "probe_steps": 4}},
        },
    }
    path = tmp_path_factory.mktemp("several") / "several.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def compared(several: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared")
    plans = plan_comparison(several, [], [], 2, out)
    write_comparison(out, run_comparison(plans), "plain")
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def controls(path: Path) -> list[tuple[Any, ...]]:
    keys = ("model", "attack", "seed", "step", "split", "value", "loss", "samples", "flops", "setting")
    return sorted(
        (tuple(str(r[k]) for k in keys) for r in lines(path) if r["model"] != "protected" and r["last_step"]),
    )


def test_all_runs_of_a_seed_share_the_clean_model_and_its_controls(compared: Path) -> None:
    for seed in (0, 1):
        first = compared / f"seed-{seed}" / "identity"
        for preset in ("ntl",):
            other = compared / f"seed-{seed}" / preset
            names = [(f / "clean" / "model.safetensors").read_bytes() for f in (first, other)]
            assert names[0] == names[1]
            assert controls(first / "records.jsonl") == controls(other / "records.jsonl")
            assert len(lines(other / "searches.jsonl")) == 3
    assert (compared / "seed-0" / "ntl" / "bundle" / "model.safetensors").is_file()


def test_taken_over_is_what_would_have_been_measured(compared: Path, several: Path, tmp_path: Path) -> None:
    Run(Inputs(load_recipe(several, "ntl")), tmp_path / "alone").all()
    theirs = compared / "seed-0" / "ntl"
    assert controls(tmp_path / "alone" / "records.jsonl") == controls(theirs / "records.jsonl")
    alone, taken = (json.loads((f / "summary.json").read_text()) for f in (tmp_path / "alone", theirs))
    assert alone["restricted"] == taken["restricted"]


def test_the_table(compared: Path) -> None:
    found = json.loads((compared / "comparison.json").read_text())
    assert list(found["rows"]) == ["identity", "ntl"]
    row = found["rows"]["identity"]
    assert row["before"] == row["after"]
    assert row["verdicts"].count("held") == 0
    ends = []
    for seed in (0, 1):
        summary = json.loads((compared / f"seed-{seed}" / "identity" / "summary.json").read_text())
        plain = next(a for a in summary["restricted"]["attacks"] if a["name"] == "plain")
        assert plain["protected"] == plain["clean"], "no defence at all"
        ends.append(plain["protected"][-1])
    assert row["attack"] == pytest.approx([sum(ends) / 2, abs(ends[0] - ends[1]) / 2**0.5])
    assert found["controls"]["clean"]["attack"] == pytest.approx(row["attack"])
    assert row["weaker"] == {}, "nothing within a battery of the recipe's own attacks"
    row = {**row, "verdicts": ["failed", "partial"], "weaker": {"a": ["held", "held"], "b": ["failed", "partial"]}}
    told = as_markdown({**found, "rows": {"identity": row}})
    assert "| 1 failed, 1 partial; 2 held by a alone |" in told
    text = as_markdown(found)
    assert text == (compared / "comparison.md").read_text()
    assert text.count("\n| ") == 5, "a header, two defences, two controls"
    assert text.startswith("# ")
    assert "identity, checks that do not pass: " in text
    for link in ("seed-1/ntl/report.html", "figures/malicious.png"):
        assert f"]({link})" in text
        assert (compared / link).is_file()
    for name in ("beneficial", "malicious"):
        assert (compared / "figures" / f"{name}.png").stat().st_size > 5000


def test_a_sweep_is_a_run_for_each_value_and_a_frontier(several: Path, tmp_path: Path) -> None:
    plans = plan_comparison(several, ["ntl"], [], 1, tmp_path, ["defence.iterations=4,10"])
    assert [p.preset for p in plans] == ["ntl@iterations=4", "ntl@iterations=10"]
    assert [p.recipe.as_dict()["defence"]["iterations"] for p in plans] == [4, 10]
    found = run_comparison(plans)
    rows = write_comparison(tmp_path, found, "plain")["rows"]
    assert list(rows) == ["ntl@iterations=4", "ntl@iterations=10"]
    for name, row in rows.items():
        (summary,) = found[name]
        worst = summary["restricted"]["worst_case"]
        assert row["standing"]["ratio"] == [summary["intactness"]["ratio"], None]
        assert row["standing"]["end"][0] == pytest.approx(worst["protected"]["final"] - worst["scratch"]["final"])
        along = worst["protected"]["along_the_way"] - worst["scratch"]["along_the_way"]
        assert row["standing"]["along"][0] == pytest.approx(along)
    assert (tmp_path / "figures" / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_every_preset_may_have_a_sweep_of_its_own(several: Path, tmp_path: Path) -> None:
    def labels(*sweeps: str) -> list[str]:
        return [p.preset for p in plan_comparison(several, [], [], 1, tmp_path, sweeps)]

    assert labels("ntl:defence.iterations=4,10") == ["identity", "ntl@iterations=4", "ntl@iterations=10"]
    recipe = yaml.safe_load(several.read_text())
    recipe["presets"] = {"plain": recipe["presets"]["ntl"], "ntl": recipe["presets"]["ntl"]}
    several = tmp_path / "several.yaml"
    several.write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert labels("ntl:defence.iterations=4", "defence.tolerance=0.1,0.2") == [
        "plain@tolerance=0.1",
        "plain@tolerance=0.2",
        "ntl@iterations=4",
    ]


@pytest.mark.parametrize("change", ["defence.name=lockout", "defence=lockout"])
def test_a_defence_runs_under_its_own_name(several: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(UserError, match="each preset of a comparison names its own defence"):
        plan_comparison(several, [], [change], 1, tmp_path)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("tolerance=0.1", "a sweep is defence.FIELD=V1,V2,"),
        ("defence.tolerance=", "a sweep is defence.FIELD=V1,V2,"),
        ("defence.=1,2", "a sweep is defence.FIELD=V1,V2,"),
        ("defence.name=ntl,sophon", "a sweep is defence.FIELD=V1,V2,"),
        ("defence.tolerance=0.1,0.1", "a value is swept twice"),
        ("defence.nosuch=1,2", "nosuch"),
        ("ntl:tolerance=0.1", "or PRESET:defence.FIELD=…; got 'ntl:tolerance=0.1'"),
        ("skd:defence.tolerance=0.1", "no preset 'skd' is compared, .*valid: ntl"),
        ("ntl:defence.tolerance=0.1 & ntl:defence.iterations=2", "ntl is swept twice"),
        ("defence.tolerance=0.1 & defence.iterations=2", "every preset is swept twice"),
    ],
)
def test_what_cannot_be_swept(several: Path, tmp_path: Path, sweep: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_comparison(several, ["ntl"], [], 1, tmp_path, sweep.split(" & "))


def test_a_curve_of_the_frontier_runs_by_what_was_swept() -> None:
    def standing(ratio: float) -> dict[str, list[float]]:
        return {"ratio": [ratio], "end": [0.0], "along": [0.0]}

    points = [("strength=1", standing(0.97)), ("strength=0.1", standing(0.99)), ("strength=0.3", standing(0.99))]
    assert [v for v, _ in in_order(points)] == ["strength=0.1", "strength=0.3", "strength=1"]
    points += [("suppression=ice", standing(0.98))]
    assert [p["ratio"][0] for _, p in in_order(points)] == [0.97, 0.98, 0.99, 0.99]


def test_an_attack_that_cannot_be_run_has_no_column(several: Path, tmp_path: Path) -> None:
    """Domains of different numbers of classes share no head: the battery's first attack keeps it, the next does not."""
    changes = ["restricted.data=digits[5-8]", "audit.battery=paper-default", "audit.attacks=[]"]
    plans = plan_comparison(several, ["identity"], changes, 1, tmp_path / "out")
    assert plans[0].recipe.audit.all_attacks()[0].name == "direct+all"
    assert check_comparison(plans) == "initFC+FC"
    with pytest.raises(
        UserError, match=r"direct\+all cannot be run here \(keeps the head.*; valid: initFC\+FC, initFC"
    ):
        check_comparison(plans, "direct+all")
    found = run_comparison(plans)
    result = write_comparison(tmp_path / "out", found, check_comparison(plans))
    assert result["rows"]["identity"]["attack"][0] is not None


def test_data_are_decoded_once_a_seed(
    compared: Path, several: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decoded: list[tuple[str, int]] = []

    def counted(spec: DomainSpec, preprocessing: Preprocessing, seed: int, least: int) -> Domain:
        decoded.append((spec.data, seed))
        return load_domain(spec, preprocessing, seed, least)

    monkeypatch.setattr("holdfast.inputs.load_domain", counted)
    shutil.copytree(compared, tmp_path / "copy")
    plans = plan_comparison(several, [], [], 2, tmp_path / "copy")
    pixels: Pixels = {}
    check_comparison(plans, None, pixels)
    run_comparison(plans, resume=True, pixels=pixels)
    assert sorted(decoded) == [(f"digits[{c}]", s) for c in ("0-4", "5-9") for s in (0, 1)]


def test_it_goes_on_where_it_was(compared: Path, several: Path) -> None:
    before = (compared / "seed-1" / "ntl" / "records.jsonl").read_bytes()
    plans = plan_comparison(several, [], [], 2, compared)
    run_comparison(plans, resume=True)
    assert (compared / "seed-1" / "ntl" / "records.jsonl").read_bytes() == before


def test_more_audit_seeds(compared: Path, several: Path, tmp_path: Path) -> None:
    out = tmp_path / "more"
    shutil.copytree(compared, out)
    plans = plan_comparison(several, [], ["audit.seeds=3"], 2, out)
    found = run_comparison(plans, resume=True)
    for seed in (0, 1):
        first, other = (out / f"seed-{seed}" / name / "records.jsonl" for name in ("identity", "ntl"))
        assert first.read_bytes().startswith((compared / first.relative_to(out)).read_bytes())
        assert controls(first) == controls(other)
        assert {r["seed"] for r in lines(other) if r["model"] == "protected" and r["attack"] == "plain"} == {0, 1, 2}
        assert next(c for c in found["ntl"][seed]["checks"] if c["name"] == "enough seeds")["passed"]


def test_a_larger_battery(compared: Path, several: Path, tmp_path: Path) -> None:
    out = tmp_path / "larger"
    shutil.copytree(compared, out)
    found = run_comparison(plan_comparison(several, [], ["audit.battery=paper-default"], 1, out), resume=True)
    first, other = (out / "seed-0" / name / "records.jsonl" for name in ("identity", "ntl"))
    assert first.read_bytes().startswith((compared / first.relative_to(out)).read_bytes())
    assert controls(first) == controls(other)
    assert len(controls(first)) == len(set(controls(first))), "nothing twice"
    for name in ("identity", "ntl"):
        assert {a["name"] for a in found[name][0]["restricted"]["attacks"]} >= {"plain", "searched", "direct+all"}


def test_a_search_is_taken_over_whole_or_not_at_all(tmp_path: Path) -> None:
    """One that a control has under some of its names is left to `run_searches`, which knows it for the others."""
    attack = Attack("a", FineTuning("head", optimiser="adam"), search=Search())
    twin = replace(attack, name="b", tuning=replace(attack.tuning, train="lora"))
    record = SearchRecord("scratch", ["a"], [], {"lr": 0.1}, False, 8, 80, 1.0, 2.0, "theirs")
    theirs, ours = AuditFiles(tmp_path / "theirs"), AuditFiles(tmp_path / "ours")
    for folder in (theirs.folder, ours.folder):
        folder.mkdir()
    told = replace(
        record, told=[{"lr": 0.3}], before="x", chosen={"lr": 0.3}
    )  # of what another protection's attackers chose
    theirs.searches.append([told, record, replace(record, provenance="other", chosen={"lr": 0.2})])
    specs = plan_searches([attack, twin])
    assert adopt_searches(theirs.folder, {"theirs"}, ours, specs, "mine") == 1
    assert ours.searches.read() == [replace(record, attacks=["a", "b"], provenance="mine")]
    assert adopt_searches(theirs.folder, {"theirs"}, ours, specs, "mine") == 0
    ours.searches.keep([replace(record, provenance="before")])
    assert adopt_searches(theirs.folder, {"theirs"}, ours, specs, "mine") == 0


def test_a_defence_that_comes_later_takes_over_all_controls(compared: Path, several: Path, tmp_path: Path) -> None:
    """Those from before an audit seed was added too: the seconds show that nothing was measured anew."""

    def seconds(name: str, file: str) -> set[tuple[str, str, float]]:
        rows = lines(out / "seed-0" / name / file)
        attack = {"records.jsonl": "attack", "searches.jsonl": "attacks"}[file]
        return {(r["model"], str(r[attack]), r["seconds"]) for r in rows if r["model"] in ("clean", "scratch")}

    out = tmp_path / "later"
    shutil.copytree(compared, out)
    run_comparison(plan_comparison(several, ["identity"], ["audit.seeds=3"], 1, out), resume=True)
    recipe = yaml.safe_load(several.read_text())
    recipe["presets"]["later"] = recipe["presets"]["ntl"]
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    run_comparison(
        plan_comparison(tmp_path / "more.yaml", ["identity", "later"], ["audit.seeds=3"], 1, out), resume=True
    )
    for file in ("records.jsonl", "searches.jsonl"):
        rows = {r for r in seconds("later", file) if not r[1].startswith(ORIGINAL)}  # intactness is each run's own
        assert len(rows) >= 2
        assert rows <= seconds("identity", file)


def test_what_cannot_be_compared(several: Path, compared: Path, tmp_path: Path) -> None:
    assert presets_of(several) == ["identity", "ntl"]
    with pytest.raises(UserError, match="unknown preset"):
        plan_comparison(several, ["identity", "nlt"], [], 1, tmp_path)
    with pytest.raises(UserError, match="named twice"):
        plan_comparison(several, ["ntl", "ntl"], [], 1, tmp_path)
    raw = yaml.safe_load(several.read_text())
    raw["presets"]["ntl"]["audit"] = {"steps": 9}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    with pytest.raises(UserError, match="differ in audit; only the defence may differ"):
        plan_comparison(tmp_path / "other.yaml", [], [], 1, tmp_path)
    with pytest.raises(UserError, match="named as its folder: not empty"):
        plan_comparison(several, ["identity", ""], [], 1, tmp_path)
    for bad, said in (({"presets": 5}, "presets must be a mapping"), ({"presets": {1: {}}}, "presets must be a")):
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**raw, **bad}))
        with pytest.raises(UserError, match=said):
            plan_comparison(tmp_path / "bad.yaml", [], [], 1, tmp_path)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        plan_comparison(tmp_path / "bad.yaml", [], [], 1, tmp_path)
    for name in ("a/b", "..", "clean"):
        raw["presets"] = {name: {}}
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(raw))
        with pytest.raises(UserError, match="named as its folder"):
            plan_comparison(tmp_path / "other.yaml", [], [], 1, tmp_path)
    del raw["presets"]
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match="no presets to compare"):
        plan_comparison(tmp_path / "none.yaml", [], [], 1, tmp_path)
    with pytest.raises(UserError, match="--seeds N instead of seed="):
        plan_comparison(several, [], ["seed=7"], 1, tmp_path)
    plans = plan_comparison(several, [], [], 1, tmp_path)
    assert check_comparison(plans) == "plain"
    with pytest.raises(UserError, match=r"unknown attack of this comparison 'planes'.*; valid: plain, searched"):
        check_comparison(plans, "planes")
    assert check_comparison(plans, "searched") == "searched"
    wrong = plan_comparison(several, [], ["original.data=digits[0-3]"], 1, tmp_path)
    with pytest.raises(UserError, match="preset ntl: head and classes do not agree"):
        check_comparison(wrong)
    assert not (tmp_path / "seed-0").exists(), "before any work"
    with pytest.raises(UserError, match="unknown attack of this comparison 'nothing'"):
        write_comparison(
            tmp_path, {"identity": [json.loads((compared / "seed-0/identity/summary.json").read_text())]}, "nothing"
        )


def test_controls_of_another_audit_are_refused(compared: Path, several: Path, tmp_path: Path) -> None:
    first = compared / "seed-0" / "identity"
    for changes, at_fault in (
        (["audit.steps=9"], "audit"),
        (["seed=1"], "seed"),
        (["restricted.per_class=50"], "restricted"),
        (["pretrain.steps=61"], "clean weights"),
        (["model.mean=[0.4]"], "model"),
    ):
        run = Run(Inputs(load_recipe(several, "identity", changes)), tmp_path / at_fault, controls=first)
        with pytest.raises(UserError, match=f"differs from this one in .*{at_fault}"):
            run.all()
    with pytest.raises(UserError, match="holds no audited run"):
        Run(Inputs(load_recipe(several, "identity")), tmp_path / "x", controls=tmp_path).all()


def test_records_of_another_environment_are_not_taken_over(compared: Path, several: Path, tmp_path: Path) -> None:
    """A run that was audited in two environments: only what was measured in ours counts."""
    import shutil

    first = tmp_path / "first"
    shutil.copytree(compared / "seed-0" / "identity", first)
    known = json.loads((first / "provenance.json").read_text())
    (name,) = known
    known["elsewhere"] = {**known[name], "versions": {"torch": "0.1"}}
    (first / "provenance.json").write_text(json.dumps(known))
    rows = lines(first / "records.jsonl")
    for row in rows:
        if row["seed"] == 1:
            row["provenance"] = "elsewhere"
    (first / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    inputs = Inputs(load_recipe(several, "ntl"))
    run = Run(inputs, tmp_path / "run", controls=first, shared=compared / "seed-0" / "clean")
    said: list[str] = []
    run.reporter.say = said.append  # type: ignore[method-assign]
    run.all()
    assert "audit: 6 results of clean and scratch taken over" in " ".join(said), "2 searches, 4 cells of seed 0"


def test_presets_in_another_order_and_another_spelling_of_the_folder(
    several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_comparison(plan_comparison(several, ["ntl"], [], 1, Path("out")))
    before = (tmp_path / "out" / "seed-0" / "ntl" / "records.jsonl").read_bytes()
    found = run_comparison(plan_comparison(several, [], [], 1, tmp_path / "out"), resume=True)
    assert list(found) == ["identity", "ntl"]
    assert (tmp_path / "out" / "seed-0" / "ntl" / "records.jsonl").read_bytes() == before


def test_a_defence_that_found_nothing_within_tolerance_is_marked(compared: Path) -> None:
    """Its row is that of the clean model: no result of the defence."""
    summaries = [json.loads((compared / f"seed-{s}" / "ntl" / "summary.json").read_text()) for s in (0, 1)]
    assert all(s["protection"]["released"] for s in summaries)
    marked = [{**s, "protection": {**s["protection"], "released": 0}} if i else s for i, s in enumerate(summaries)]
    table = as_markdown(write_comparison(compared / "marked", {"ntl": marked}, "plain"))
    assert "| ntl († 1 of 2) |" in table
    assert table.splitlines()[-1].startswith("† no state within the tolerance")
    assert "†" not in (compared / "comparison.md").read_text()


def test_another_recipes_clean_model_is_refused(compared: Path, several: Path, tmp_path: Path) -> None:
    """Where the preset is new to the folder, nothing else would tell."""
    folder = tmp_path / "out"
    shutil.copytree(compared, folder)
    shutil.rmtree(folder / "seed-0" / "ntl")
    plans = plan_comparison(several, ["ntl"], ["pretrain.steps=61"], 1, folder)
    with pytest.raises(UserError, match="belongs to another run"):
        run_comparison(plans)
    assert not (folder / "seed-0" / "ntl").exists()


def test_a_clean_model_of_other_data_is_refused(compared: Path, several: Path, tmp_path: Path) -> None:
    changes = ["original.data=digits[1-4]", "restricted.data=digits[5-8]"]
    recipe = load_recipe(several, "identity", changes)
    with pytest.raises(UserError, match="made from other data or weights"):
        Run(Inputs(recipe), tmp_path / "run", shared=compared / "seed-0" / "clean").all()


def test_one_protection_has_the_spread_of_its_audit_or_none(compared: Path, tmp_path: Path) -> None:
    summary = json.loads((compared / "seed-0" / "ntl" / "summary.json").read_text())
    measured = {"clean": {"misses": 1.0}, "protected": {"misses": 0.25}}
    summary["protection"] = {**summary["protection"], "measured": measured}
    many = {f"preset {i}": [summary] for i in range(11)}
    found = write_comparison(tmp_path, many, "plain")
    row = found["rows"]["preset 10"]
    plain = next(a for a in summary["restricted"]["attacks"] if a["name"] == "plain")
    assert row["attack"] == pytest.approx([plain["protected"][-1], plain["deviation"]["protected"][-1]])
    assert row["after"][1] is None
    assert row["along"][1] is None
    text = (tmp_path / "comparison.md").read_text()
    assert "± 0.0" not in text.replace(f"± {100 * plain['deviation']['protected'][-1]:.1f}", "")
    assert "preset 10, in %: misses 25.0 (unprotected 100.0)" in text
