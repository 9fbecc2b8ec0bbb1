"""The audit's own controls: what must fail fails under every battery, what must hold holds, and says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.attacks.batteries import BATTERIES
from holdfast.domains import Domain
from holdfast.models import Architecture, State, save_weights
from holdfast.pipeline import audit_checkpoint, run
from holdfast.pretraining import pretrain
from holdfast.recipes import PRETRAIN, parse_recipe
from holdfast.runtime import Runtime
from holdfast.tasks import Classification

PLAIN = Architecture("small_conv", size=8, channels=1, options={"width": 16, "norm": False})


def recipe(weights: Path, norm: bool, **audit: object) -> Any:
    raw = {
        "name": "control",
        "original": {"data": "digits[0-4]", "test_per_class": 40},
        "restricted": {"data": "digits[5-9]", "test_per_class": 40, "adversary": 60},
        "benign": {"data": "digits[1,3,5,7,9]", "test_per_class": 20},
        "model": {"name": "small_conv", "size": 8, "channels": 1, "options": {"width": 16 if not norm else 8}},
        "weights": str(weights),
        "defence": "identity",
        "audit": {"steps": 16, "seeds": 1, "evaluations": 4, **audit},
        "runtime": {"precision": "float32", "jobs": 1},
    }
    raw["model"]["options"]["norm"] = norm  # type: ignore[index]
    return parse_recipe(raw)


@pytest.fixture(scope="module")
def plain_state(original: Domain, task: Classification, runtime: Runtime) -> State:
    """A network without batch normalisation, pre-trained on digits 0-4: there, scale matters."""
    return pretrain(PLAIN, original, replace(PRETRAIN, steps=400, lr=3e-3), task, runtime)


def saved(state: State, path: Path) -> Path:
    save_weights(path, state)
    return path


@pytest.mark.parametrize("battery", BATTERIES)
def test_the_identity_is_failed_by_every_battery(battery: str, clean_state: State, tmp_path: Path) -> None:
    weights = saved(clean_state, tmp_path / "clean.safetensors")
    found = run(recipe(weights, True, battery=battery), tmp_path / "run", quiet=True)
    restricted = found["restricted"]
    if battery == "paper-default":  # too weak for 16 steps: it says that it shows nothing
        assert not {c["name"]: c["passed"] for c in found["checks"]}["the clean model learns"]
    else:
        assert found["verdict"] == "failed"
    assert found["intactness"]["ratio"] == 1
    assert restricted["worst_case"]["protected"]["final"] == restricted["worst_case"]["clean"]["final"]
    assert all(a["protected"] == a["clean"] for a in restricted["attacks"]), "the same weights, the same cell"
    run_of = {a["name"] for a in restricted["attacks"]}
    left_out = {a.name for a in BATTERIES[battery].attacks} - run_of
    assert left_out <= {"regrown → initFC+all", "regrown, rebalanced → initFC+all"}
    assert found["benign"]["difference"] == 0
    if battery in ("standard", "adaptive"):
        assert found["restricted"]["slc"]["auc"]["protected"] == found["restricted"]["slc"]["auc"]["clean"]
        assert found["search"]["protected"] == {**found["search"]["clean"], "seconds": pytest.approx(0, abs=1e4)}


def rescaled(state: State) -> State:
    """Layers 0 and 2, 4 and 6 scaled against each other by 300: the same function, and no learning rate fits."""
    out = {n: v.clone() for n, v in state.items()}
    for first, second, factor in (("0", "2", 300.0), ("6", "4", 300.0)):
        for name in (f"{first}.weight", f"{first}.bias"):
            out[name] *= factor if first == "0" else 1 / factor
        if first == "0":
            out[f"{second}.weight"] /= factor
        else:
            out["10.weight"] *= factor
    return out


def test_rescaled_weights_fail_and_the_edit_that_undid_it_is_named(plain_state: State, tmp_path: Path) -> None:
    """Great sensitivity to the learning rate, no protection: the function is the clean model's."""
    clean = saved(plain_state, tmp_path / "clean.safetensors")
    protected = saved(rescaled(plain_state), tmp_path / "protected.safetensors")
    found = audit_checkpoint(
        recipe(clean, False, battery="quick", steps=48), str(protected), tmp_path / "audit", quiet=True
    )
    assert found["intactness"]["ratio"] == pytest.approx(1, abs=0.01)
    by_name = {a["name"]: a for a in found["restricted"]["attacks"]}
    assert by_name["direct+all"]["protected"][-1] < by_name["direct+all"]["clean"][-1] + 0.05
    assert found["verdict"] == "failed"
    assert found["restricted"]["undone"]["edits"] == ["rebalance"]
    text = (tmp_path / "audit" / "report.md").read_text()
    assert "What undoes it: rebalance" in text


def test_random_weights_hold_and_intactness_is_lost(
    clean_state: State, architecture: Architecture, tmp_path: Path
) -> None:
    clean = saved(clean_state, tmp_path / "clean.safetensors")
    random = saved(architecture.build(5, seed=99).state_dict(), tmp_path / "random.safetensors")
    spec = recipe(clean, True, battery="quick", steps=32, seeds=5)
    found = audit_checkpoint(spec, str(random), tmp_path / "audit", quiet=True)
    assert found["verdict"] == "held", found["restricted"]["worst_case"]
    assert found["intactness"]["ratio"] < 0.5
    assert "own ability is lost" in (tmp_path / "audit" / "report.md").read_text()
