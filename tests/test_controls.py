"""The audit's own controls: what must fail fails under every battery, what must hold holds, and says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from holdfast.attacks.attack import Attack
from holdfast.attacks.batteries import BATTERIES
from holdfast.attacks.preparation import Heal
from holdfast.domains import Domain, DomainSpec
from holdfast.finetuning import FineTuning
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


WITHIN = ("paper-default", "standard")  # an audit by `adaptive` judges by these as well
ALONE = [n for n in sorted(BATTERIES) if n not in ("own", *WITHIN) and not n.startswith("generation")]


@pytest.mark.parametrize("battery", ALONE)
def test_the_identity_is_failed_by_every_battery(battery: str, clean_state: State, tmp_path: Path) -> None:
    weights = saved(clean_state, tmp_path / "clean.safetensors")
    found = run(recipe(weights, True, battery=battery), tmp_path / "run", quiet=True)
    restricted = found["restricted"]
    assert found["verdict"] == "failed"
    assert found["intactness"]["ratio"] == 1
    assert restricted["worst_case"]["protected"]["final"] == restricted["worst_case"]["clean"]["final"]
    assert all(a["protected"] == a["clean"] for a in restricted["attacks"]), "the same weights, the same cell"
    run_of = {a["name"] for a in restricted["attacks"]}
    left_out = {a.name for a in BATTERIES[battery].attacks} - run_of
    assert left_out <= {"regrown → initFC+all", "regrown + rebalanced → initFC+all"}
    assert found["benign"]["difference"] == 0
    if battery == "adaptive":
        judged = {s["battery"]: (s["attacks"], s["verdict"]) for s in restricted["strengths"]}
        within = {BATTERIES[n].title: {a.name for a in BATTERIES[n].attacks} for n in (*WITHIN, battery)}
        assert judged == {title: (len(names & run_of), "failed") for title, names in within.items()}
        assert found["restricted"]["slc"]["auc"]["protected"] == found["restricted"]["slc"]["auc"]["clean"]
        assert found["search"]["protected"] == {**found["search"]["clean"], "seconds": pytest.approx(0, abs=1e4)}


def rescaled(state: State) -> State:
    """Channels of consecutive layers scaled against each other over six decades: the same function, and no learning
    rate that fits all weights."""
    out = {n: v.clone() for n, v in state.items()}
    for first, second in (("0", "2"), ("2", "4"), ("4", "6")):
        draw = torch.rand(len(out[f"{first}.bias"]), generator=torch.Generator().manual_seed(int(first)))
        factors = 1000 ** (2 * draw - 1)
        out[f"{first}.weight"] *= factors[:, None, None, None]
        out[f"{first}.bias"] *= factors
        out[f"{second}.weight"] /= factors[:, None, None]
    return out


@pytest.fixture
def renamed(tmp_path: Path) -> Path:
    """Digits 0-4 under other names: what the clean network sees in them serves, its head does not."""
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = tmp_path / "renamed" / f"class-{(label + 2) % 5}"
        if label < 5:
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "renamed"


def test_rescaled_weights_fail_and_the_edit_that_undid_it_is_named(
    plain_state: State, renamed: Path, tmp_path: Path
) -> None:
    """Great sensitivity to the learning rate, no protection: the function is the clean model's."""
    clean = saved(plain_state, tmp_path / "clean.safetensors")
    protected = saved(rescaled(plain_state), tmp_path / "protected.safetensors")
    spec = recipe(clean, False, battery="quick", steps=32)
    spec = replace(spec, restricted=DomainSpec(str(renamed), adversary=20), benign=None)
    found = audit_checkpoint(spec, str(protected), tmp_path / "audit", quiet=True)
    assert found["intactness"]["ratio"] == pytest.approx(1, abs=0.01)
    by_name = {a["name"]: a for a in found["restricted"]["attacks"]}
    for name in ("initFC+all", "initFC+all · momentum swept"):
        assert by_name[name]["protected"][-1] < by_name[name]["clean"][-1] - 0.1, name
    assert found["verdict"] == "failed"
    assert found["restricted"]["undone"]["edits"] == ["rebalance"]
    assert found["restricted"]["undone"]["gain"] > 0.02
    assert "What undoes it: rebalance" in (tmp_path / "audit" / "report.md").read_text()


def test_random_weights_hold_and_intactness_is_lost(
    renamed: Path, tmp_path: Path, original: Domain, task: Classification, runtime: Runtime
) -> None:
    """Weights that know nothing give the attacker nothing: held, and worthless. The clean ones are far ahead."""
    wide = Architecture("small_conv", size=8, channels=1, options={"width": 32})  # where one draw is as good as another
    state = pretrain(wide, original, replace(PRETRAIN, steps=200, lr=3e-3), task, runtime)
    clean = saved(state, tmp_path / "clean.safetensors")
    random = saved(wide.build(5, seed=99).state_dict(), tmp_path / "random.safetensors")
    strong = FineTuning("head", optimiser="adam", lr=5e-3, batch_size=40, steps=24)
    momentum = replace(strong, optimiser="momentum", lr=3e-2)
    # Healing brings data that are worth something to anyone: the control has them too.
    attacks = (Attack("adam", strong), Attack("momentum", momentum), Attack("healed", strong, (Heal(),)))
    spec = recipe(clean, True, battery="paper-default", steps=24, seeds=8, attacks=attacks)
    spec = replace(spec, model=wide, restricted=DomainSpec(str(renamed), adversary=80), benign=None)
    found = audit_checkpoint(spec, str(random), tmp_path / "audit", quiet=True)
    worst = found["restricted"]["worst_case"]
    assert worst["clean"]["final"] > worst["scratch"]["final"] + 0.02
    assert found["verdict"] == "held", (worst, found["checks"])
    assert found["intactness"]["ratio"] < 0.5
    assert "own ability is lost" in (tmp_path / "audit" / "report.md").read_text()
