"""Fixtures: small real data (scikit-learn's digits), a small network, float32 on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from holdfast.cells import Bench, Ground
from holdfast.domains import Domain, load_domain
from holdfast.models import Architecture, State
from holdfast.pretraining import pretrain
from holdfast.recipes import PRETRAIN
from holdfast.runtime import Runtime
from holdfast.tasks import Classification

LONGEST = ("test_run", "test_controls", "test_workers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # what a test draws is its own, whichever ran before it in this process
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _only_built_in_data(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see HOLDFAST_DATA only where they are marked `data`."""
    if request.node.get_closest_marker("data") is None:
        monkeypatch.delenv("HOLDFAST_DATA", raising=False)


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return Runtime.choose("cpu", "float32")


@pytest.fixture(scope="session")
def architecture() -> Architecture:
    return Architecture("small_conv", size=8, channels=1, options={"width": 8})


@pytest.fixture(scope="session")
def task() -> Classification:
    return Classification()


@pytest.fixture(scope="session")
def original(architecture: Architecture) -> Domain:
    return load_domain("digits[0-4]", architecture.preprocessing)


@pytest.fixture(scope="session")
def restricted(architecture: Architecture) -> Domain:
    return load_domain("digits[5-9]", architecture.preprocessing)


@pytest.fixture(scope="session")
def clean_state(architecture: Architecture, original: Domain, task: Classification, runtime: Runtime) -> State:
    """Weights pre-trained on digits 0-4."""
    from dataclasses import replace

    return pretrain(architecture, original, replace(PRETRAIN, steps=250, lr=3e-3), task, runtime)


@pytest.fixture
def tiny_recipe() -> dict[str, object]:
    """A whole run in a few seconds."""
    return {
        "name": "tiny",
        "original": {"data": "digits[0-4]", "per_class": 60, "test_per_class": 20},
        "restricted": {"data": "digits[5-9]", "per_class": 60, "test_per_class": 20},
        "model": {"name": "small_conv", "size": 8, "channels": 1, "options": {"width": 8}},
        "pretrain": {"steps": 60, "batch_size": 50, "lr": 0.005},
        "defence": {
            "name": "sophon",
            "adversaries": 1,
            "inner_steps": 3,
            "inner_batch_size": [20],
            "iterations": 6,
            "check_every": 2,
            "ntr_batch_size": 30,
            "probe_steps": 4,
            "tolerance": 0.2,
        },
        "audit": {"battery": "paper-default", "steps": 8, "seeds": 2, "evaluations": 3},
        "runtime": {"precision": "float32", "jobs": 1},
    }


@pytest.fixture
def recipe_file(tiny_recipe: dict[str, object], tmp_path: Path) -> Path:
    import yaml

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    return path


@pytest.fixture
def bench(
    original: Domain,
    restricted: Domain,
    architecture: Architecture,
    clean_state: State,
    task: Classification,
    runtime: Runtime,
) -> Bench:
    """Two seeds of an audit of 6 steps whose protected model is the clean one."""
    ground = Ground((restricted.train, restricted.train), restricted.validation, restricted.test, 5)
    states = {"protected": clean_state, "clean": clean_state}
    return Bench(states, architecture, 5, ground, task, runtime, 6, 2, "p", (original.train,) * 2, ground)
