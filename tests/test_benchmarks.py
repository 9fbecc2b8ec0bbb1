"""The benchmarks still run (their figures live in docs/performance.md)."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from holdfast.inputs import Inputs
from holdfast.recipes import parse_recipe
from holdfast.runtime import Runtime

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cells_per_minute() -> None:
    found = load("audit").measure("small_conv", cells=1, steps=2, jobs=1, rounds=1, with_ray=False)
    assert found["ways"]["one by one, 1 thread"]["ratio"] == 1
    assert all(way["cells_per_minute"] > 0 for way in found["ways"].values())


def test_the_three_ways_to_spend_k_steps() -> None:
    module = load("simulation")
    bench = module.Bench("small_conv", Runtime.choose("cpu"))
    for way in (bench.loop, bench.passes, bench.unroll):
        assert module.seconds(lambda way=way: way(1)) > 0


def test_images_a_second_as_a_share_of_the_matrix_rate() -> None:
    """By hand: share × matrix rate = images a second × FLOPs of an image."""
    module, runtime = load("rate"), Runtime.choose("cpu")
    peak = module.matrix_rate(runtime, 256, 1)
    found = module.measure("small_conv", 16, 8, 1, 1, runtime, (False,), peak)
    asked = found["images_per_second"]["eager"] * found["gflops_an_image"] * 1e9
    assert abs(found["share"]["eager"] - asked / peak) < 0.02


def test_a_whole_setting_is_projected_from_a_few_iterations(tiny_recipe) -> None:
    """By hand: hours = the mean of the iterations that count × all of the setting's ÷ 3600."""
    recipe = parse_recipe({**tiny_recipe, "runtime": {"device": "cpu", "precision": "float32"}})
    spec = replace(recipe.defence_object, iterations=36_000)
    found = load("protection").measure(Inputs(recipe), spec, False, 1, 2)
    assert len(found["first"]) == 1
    assert 0 < found["seconds_an_iteration"] == pytest.approx(found["hours"] / 10, abs=1e-3)
    assert all(seconds >= 0 for seconds in found["check"])


def test_what_protecting_costs_preset_beside_preset(tmp_path, tiny_recipe) -> None:
    """Each in a process of its own; by hand: seconds = iteration × iterations + check × checks."""
    presets = {n: {"defence": {**tiny_recipe["defence"], "iterations": i}} for n, i in (("a", 2), ("b", 4))}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({**tiny_recipe, "presets": presets}))
    command = [sys.executable, str(FOLDER / "cost.py"), str(path), "--presets", "a,b", "--repeats=1", "--iterations=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)["presets"]
    assert found["b"]["against"] == {"seconds": 1, "mb": 1}
    assert (found["a"]["iterations"], found["b"]["iterations"]) == (2, 4)
    for row in found.values():
        whole = row["iteration"] * row["iterations"] + row["check"] * row["checks"]
        assert row["seconds"] == pytest.approx(whole, abs=0.02)
        assert row["mb"] > 100


def test_peak_memory_is_measured_in_a_fresh_process() -> None:
    # The full unroll keeps every step's graph, tens of MB: a loop's few are lost now and then in the kernel's rounding.
    command = [sys.executable, str(FOLDER / "simulation.py"), "--peak", "small_conv", "unroll", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert 10 < json.loads(done.stdout.strip().splitlines()[-1]) < 2000


def test_failures_of_a_suppression_loss_by_hand() -> None:
    """Two that are not finite; 1 → 0.05 and back are jumps, 0.05 → 0.001 is none: both are small."""
    values = [1.0, 0.05, 1.0, 0.9, float("nan"), 0.8, float("inf"), 0.05, 0.001]
    assert load("stability").failures(values) == {"not finite": 2, "jumps": 2}


def test_a_protection_as_one_line_of_a_table(tmp_path: Path) -> None:
    """By hand: in the mean of the later steps the first attack is 0.1 below scratch, the second 0.2 above."""

    def attack(verdict: str, protected: list[float], interval: list[float] | None) -> dict[str, object]:
        curves = {"scratch": [0.1, 0.3, 0.5], "clean": [0.1, 0.5, 0.7], "protected": protected}
        return {"verdict": verdict, "interval": interval, **curves}

    models = {
        m: {"final": e, "along_the_way": a}
        for m, e, a in [("scratch", 0.5, 0.3), ("clean", 0.7, 0.5), ("protected", 0.4, 0.32)]
    }
    summary = {
        "verdict": "partial",
        "intactness": {"before": 0.8, "after": 0.72, "ratio": 0.9},
        "restricted": {
            "metric": "accuracy",
            "worst_case": {**models, "interval_along": [-0.01, 0.05], "interval": None},
            "attacks": [
                attack("held", [0.9, 0.2, 0.4], [-0.2, -0.05]),
                attack("failed", [0.9, 0.5, 0.7], [0.1, 0.3]),
                attack("inconclusive", [0.1, 0.3, 0.5], None),
            ],
            "slc": {"auc": {"protected": {"mean": -0.12}, "clean": {"mean": 0.2}}},
        },
        "limits": [{"scratch": {"mean": s}, "clean": {"mean": 0.4}, "protected": {"mean": 0.3}} for s in (0.1, 0.3)],
        "benign": {"along_the_way": -0.02, "difference": 0.004},
    }
    run = tmp_path / "mine"
    run.mkdir()
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "run.json").write_text(json.dumps({"recipe": {"seed": 3}}))
    module = load("results_table")
    cells = module.row(run).strip("| ").split(" | ")
    assert len(cells) == len(module.COLUMNS)
    assert cells == [
        "mine, seed 3",
        "partial",
        "80.0 → 72.0 (0.900)",
        "30.0, 50.0, 32.0",
        "50.0, 70.0, 40.0",
        "+2.0 (−1.0 … +5.0)",
        "−10.0",
        "1 of 2",
        "1",
        "+3.3 (+20.0)",
        "−0.12 (+0.20)",
        "20.0, 40.0, 30.0",
        "−2.0, +0.4",
    ]
    (tmp_path / "clean").mkdir()
    said = table_of(tmp_path / "clean", run)
    assert said.returncode == 0
    assert said.stdout.splitlines()[2:] == [module.row(run)]
    assert said.stderr == "left out, without a summary.json: clean\n"
    refused = table_of(tmp_path / "clean")
    assert refused.returncode == 2
    assert "no summary.json of a finished run in any of" in refused.stderr.splitlines()[-1]


def table_of(*runs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, FOLDER / "results_table.py", "--rows", *runs]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
