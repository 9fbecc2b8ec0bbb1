"""The benchmarks still run (their figures live in docs/performance.md)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from holdfast.runtime import Runtime

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def test_the_three_ways_to_spend_k_steps() -> None:
    spec = importlib.util.spec_from_file_location("simulation_benchmark", FOLDER / "simulation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bench = module.Bench("small_conv", Runtime.choose("cpu"))
    for way in (bench.loop, bench.passes, bench.unroll):
        assert module.seconds(lambda way=way: way(1)) > 0


def test_peak_memory_is_measured_in_a_fresh_process() -> None:
    command = [sys.executable, str(FOLDER / "simulation.py"), "--peak", "small_conv", "loop", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert 0 < json.loads(done.stdout.strip().splitlines()[-1]) < 2000
