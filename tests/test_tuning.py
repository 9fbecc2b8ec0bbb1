"""The defender's search: what it tries, what it calls good, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from holdfast.errors import UserError
from holdfast.tuning import LEFT, Axis, Tuning, _behind, as_table, parse_axis, score


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    data: dict[str, Any] = {
        "name": "pair",
        "original": {"data": "digits[0-4]", "per_class": 60, "test_per_class": 20},
        "restricted": {"data": "digits[5-9]", "per_class": 60, "test_per_class": 20},
        "model": {"name": "small_conv", "size": 8, "channels": 1, "options": {"width": 8}},
        "pretrain": {"steps": 60, "batch_size": 50, "lr": 0.005},
        "audit": {
            "battery": "own",
            "steps": 6,
            "seeds": 1,
            "evaluations": 2,
            "attacks": [{"name": "plain", "tuning": {"initialise": "head", "optimiser": "adam", "lr": 0.01}}],
        },
        "runtime": {"precision": "float32", "jobs": 1},
        "defence": {"name": "ntl", "iterations": 4, "check_every": 2, "probe_steps": 2},
    }
    path = tmp_path_factory.mktemp("pair") / "pair.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return str(path)


def test_axes() -> None:
    assert parse_axis("defence.spread=0.25..4") == Axis("defence.spread", 0.25, 4.0)
    assert parse_axis("defence.spread=0.25..4").log
    assert not parse_axis("defence.repair=0.2..0.8").log
    assert parse_axis("defence.lr=1e-4..1e-2") == Axis("defence.lr", 1e-4, 1e-2)
    assert parse_axis("defence.update=joint, alternating").choices == ("joint", "alternating")
    assert parse_axis("defence.inner_lr=[1e-3, 1e-2], [1e-4]").choices == ("[1e-3, 1e-2]", "[1e-4]")
    assert parse_axis("defence.close=2..8").own(4) == 4
    assert parse_axis("defence.close=2..8").own(9) is None
    assert parse_axis("defence.close=2..8").own("alternating") is None
    assert parse_axis("defence.shift=true,false").own(True) == "true"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spread=1..2", "what is searched is defence.FIELD=LOW..HIGH"),
        ("defence.spread", "what is searched is defence.FIELD=LOW..HIGH"),
        ("defence.spread=2..1", "'defence.spread=2..1' is no range"),
        ("defence.spread=1e..2", "is no range"),
        ("defence.spread=1", "leaves nothing to choose"),
    ],
)
def test_bad_axes(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_axis(text)


def test_a_lost_point_of_intactness_costs_ten() -> None:
    worst = {"protected": {"final": 0.5, "along_the_way": 0.4}, "scratch": {"final": 0.52, "along_the_way": 0.39}}
    summary = {"restricted": {"worst_case": worst}, "intactness": {"ratio": 0.96}}
    found = score(summary)
    assert found["ahead"] == pytest.approx(0.01)
    assert found["loss"] == pytest.approx(0.01 + 10 * 0.01)
    summary["intactness"] = {"ratio": 0.98}
    assert score(summary)["loss"] == pytest.approx(0.01)


def test_it_tries_the_recipes_own_setting_first_and_goes_on_where_it_was(recipe: str, tmp_path: Path) -> None:
    axes = [parse_axis("defence.iterations=2..8"), parse_axis("defence.factor=1..4")]
    first = Tuning([recipe], axes, tmp_path).run(2)
    assert first["trials"][0]["setting"] == {"defence.iterations": 4, "defence.factor": 2.0}
    assert len(first["trials"]) == 2
    with pytest.raises(UserError, match="already holds a search; add --resume"):
        Tuning([recipe], axes, tmp_path).run(3)
    with pytest.raises(UserError, match="holds a search with another space"):
        Tuning([recipe], axes[:1], tmp_path).run(3, resume=True)
    # A try that was killed: asked for, never told.
    search = Tuning([recipe], axes, tmp_path, workers=["runtime.jobs=2"])  # who computes is no part of the search
    left = search._study(tmp_path / "study.log").ask()
    setting = {a.key: a.suggest(left) for a in search.axes}
    result = search.run(3, resume=True)
    assert [t["setting"] for t in result["trials"][:2]] == [t["setting"] for t in first["trials"]]
    assert result["trials"][2]["setting"] == setting
    assert result == json.loads((tmp_path / "tune.json").read_text())
    assert result["best"]["loss"] == min(t["loss"] for t in result["trials"])
    assert "best: --set defence.iterations=" in as_table(result)
    again = Tuning([recipe], axes, tmp_path).run(5, resume=True)["trials"]
    assert len({json.dumps(t["setting"]) for t in again}) == 5, "a search that goes on draws something new"
    # One clean model and one set of controls for all.
    runs = sorted(p.parent.name for p in (tmp_path / "pair").glob("try-*/summary.json"))
    assert len(runs) == 5
    scratch = {
        json.loads((tmp_path / "pair" / r / "summary.json").read_text())["restricted"]["worst_case"]["scratch"]["final"]
        for r in runs
    }
    assert len(scratch) == 1


def test_what_cannot_be_searched_is_said_before_any_work(recipe: str, tmp_path: Path) -> None:
    for space, message in (
        ("defence.nosuch=1..2", "unknown key 'defence.nosuch'"),
        ("defence.tolerance=0.1..3", "tolerance must lie"),
        ("defence.auxiliary=restricted,nosuch", "nosuch"),
    ):
        with pytest.raises(UserError, match=message):
            Tuning([recipe], [parse_axis(space)], tmp_path / "new").run(1)
    assert not (tmp_path / "new").exists()
    assert Tuning([recipe], [parse_axis("defence.tolerance=0..1")], tmp_path).axes[0].whole is False


def test_a_setting_that_the_network_refuses_is_passed_over(recipe: str, tmp_path: Path) -> None:
    """Eight activations to close load, but the network has four."""
    lockout = "defence={name: lockout, iterations: 1, steps: 1, check_every: 1, probe_steps: 1}"
    result = Tuning([recipe], [parse_axis("defence.close=4,8")], tmp_path, changes=[lockout]).run(3)
    assert {t["setting"]["defence.close"] for t in result["trials"]} == {"4"}
    assert {r["defence.close"] for r in result["refused"]} == {"8"}


def test_a_field_of_a_nested_stage_is_searched_like_any_other(recipe: str, tmp_path: Path) -> None:
    lockout = "defence={name: lockout, sophon: {iterations: 90, inner_steps: 7}}"
    axes = [parse_axis(f"defence.{n}") for n in ("sophon.iterations=50..200", "sophon.alpha=1e-4..1e-3", "close=2,4")]
    search = Tuning([recipe], axes, tmp_path, changes=[lockout])
    assert [a.whole for a in search.axes] == [True, False, False]
    assert search.default() == {"defence.sophon.iterations": 90, "defence.sophon.alpha": 3e-4, "defence.close": "4"}
    search.check()


def test_a_setting_that_the_defence_refuses_is_passed_over(recipe: str, tmp_path: Path) -> None:
    """Both ends are allowed, and what lies between is not."""
    search = Tuning([recipe], [parse_axis("defence.iterations=2..8")], tmp_path)
    plans = search.plans

    def refusing(setting: Any, first: Any = None) -> Any:
        if setting["defence.iterations"] != 4:
            raise UserError("no")
        return plans(setting, first)

    search.plans = refusing  # type: ignore[method-assign]
    result = search.run(3)
    assert [t["setting"] for t in result["trials"]] == [{"defence.iterations": 4}] * len(result["trials"])
    assert len(result["trials"]) + len(result["refused"]) == 3
    assert result["refused"]


def test_a_setting_that_is_behind_on_the_first_pair_is_not_tried_on_the_second(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attacker is `factor` points ahead on the first pair, −`factor` on the second."""
    other = tmp_path / "other.yaml"
    other.write_text(Path(recipe).read_text())

    def audited(plans: Any, *_: Any) -> Any:
        (plan,) = plans
        ahead = plan.recipe.defence.factor * (1 if plan.base.name == "pair" else -1)
        worst = {m: {"final": v, "along_the_way": 0.0} for m, v in (("protected", ahead), ("scratch", 0.0))}
        restricted = {"worst_case": worst, "metric": "accuracy"}
        return {plan.preset: [{"restricted": restricted, "intactness": {"ratio": 1.0}, "verdict": "failed"}]}

    monkeypatch.setattr("holdfast.tuning.run_comparison", audited)
    result = Tuning([recipe, str(other)], [parse_axis("defence.factor=1..4")], tmp_path / "out").run(12)
    finished = [t["scores"]["pair"]["ahead"] for t in result["trials"]]
    stopped = [t["scores"]["pair"]["ahead"] for t in result["stopped"]]
    assert len(finished) + len(stopped) == 12
    assert result["refused"] == []
    assert stopped, "of eight tries after the first four some are behind"
    assert all(t["loss"] == t["scores"]["pair"]["loss"] for t in result["stopped"])
    assert finished[:4] == [t["scores"]["pair"]["ahead"] for t in result["trials"][:4]], (
        "the first four are tried whole"
    )
    assert all(set(t["scores"]) == {"pair"} for t in result["stopped"])
    rows = [r for r in as_table(result).splitlines() if "stopped" in r]
    assert len(rows) == len(stopped)
    assert all(" | – | " in r for r in rows)
    again = Tuning([recipe, str(other)], [parse_axis("defence.factor=1..4")], tmp_path / "out").run(13, resume=True)
    assert len(again["trials"]) + len(again["stopped"]) == 13, "what was stopped counts as tried"


def test_behind_is_above_the_median_of_all_that_have_come_as_far() -> None:
    study = optuna.create_study()
    losses = [(0.1, 0.9), (0.2, None), (0.3, 0.1), (None, None), (0.4, 0.2)]  # a refused one among them
    for values in losses[:-1]:
        trial = study.ask()
        for i, value in enumerate(values, 1):
            if value is not None:
                trial.report(value, i)
        study.tell(trial, values[1], state=None if values[1] is not None else LEFT)
    assert not _behind(study, 1, 9.0), "three have come as far"
    trial = study.ask()
    trial.report(0.4, 1)
    trial.report(0.2, 2)
    study.tell(trial, 0.2)
    assert not _behind(study, 1, 0.25), "half of 0.1, 0.2, 0.3, 0.4"
    assert _behind(study, 1, 0.26)
    assert not _behind(study, 2, 9.0), "three have come to the second"


def test_a_try_that_was_killed_while_it_was_drawn_is_tried_whole(recipe: str, tmp_path: Path) -> None:
    axes = [parse_axis("defence.iterations=2..8"), parse_axis("defence.factor=1..4")]
    search = Tuning([recipe], axes, tmp_path)
    left = search._study(tmp_path / "study.log").ask()
    search.axes[0].suggest(left)
    assert search.run(1, resume=True)["trials"][0]["setting"] == {"defence.iterations": 4, "defence.factor": 2.0}
