"""Seconds an iteration of SOPHON in the paper's full setting, way by way: `python benchmarks/protection.py`.

The setting is that of a recipe (default: `sophon/cifar10-mnist_m`, preset `paper`: ResNet-18 at 64×64, 800 iterations
of three adversaries of K = 50, batches of up to 200), its model untrained: the time is the same. Each way (`eager`,
`compiled`, `graphed`) runs `--warmup` iterations, then `--iterations` that count; `hours` is their mean times the
setting's iterations, without the checks between them, which are timed apart.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import torch

from holdfast.defences.sophon import Sophon
from holdfast.inputs import Inputs
from holdfast.recipes import load_recipe
from holdfast.records import provenance
from holdfast.runtime import Compile, peak_memory_mb, reset_peak_memory

WAYS: dict[str, Compile] = {"eager": False, "compiled": True, "graphed": "graphs"}


def seconds(work: Any, device: str) -> float:
    """Wall time of `work()`, the device's included."""
    started = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(inputs: Inputs, spec: Sophon, way: Compile, warmup: int, iterations: int) -> dict[str, Any]:
    """One way: seconds of each iteration and of the two measurements of a check, peak memory."""
    runtime = replace(inputs.runtime, compile=way)
    given = replace(
        inputs.given(runtime.place(inputs.architecture.build(len(inputs.original.classes)))),
        original=inputs.original.to(runtime),
        restricted=inputs.halves[0].to(runtime),
        runtime=runtime,
    )
    engine = spec.prepare(given)
    first = [seconds(lambda i=i: engine.iterate(i + 1, 1.0), runtime.device) for i in range(warmup)]
    reset_peak_memory(runtime.device)
    times = [
        seconds(lambda i=i: engine.iterate(i + 1, 1.0), runtime.device) for i in range(warmup, warmup + iterations)
    ]
    mean = sum(times) / len(times)
    return {
        "first": [round(t, 2) for t in first],
        "seconds_an_iteration": round(mean, 3),
        "spread": round(max(times) - min(times), 3),
        "hours": round(mean * spec.iterations / 3600, 3),
        "check": [round(seconds(f, runtime.device), 2) for f in (given.original_metric, engine.restricted_metric)],
        "peak_mb": round(peak_memory_mb(runtime.device)),
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="sophon/cifar10-mnist_m")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.preset, arguments.changes)
    spec = recipe.defence_object
    if not isinstance(spec, Sophon):
        parser.error(f"{arguments.recipe} does not protect with SOPHON")
    inputs = Inputs(recipe)
    ways = {w: measure(inputs, spec, WAYS[w], arguments.warmup, arguments.iterations) for w in arguments.ways}
    setting = {"model": recipe.model.name, "size": recipe.model.size, "iterations": spec.iterations}
    setting |= {"adversaries": spec.adversaries, "steps": spec.inner_steps, "loops": spec.fts_loops}
    print(json.dumps({"setting": setting, "ways": ways, **provenance(inputs.runtime, {})}, indent=2))


if __name__ == "__main__":
    main()
