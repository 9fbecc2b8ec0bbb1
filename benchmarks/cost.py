"""What protecting costs, preset beside preset: `python benchmarks/cost.py lockout/mnist-usps --presets lockout,sophon`.

Each preset is measured `--repeats` times, in turn, each time in a process of its own: `--warmup` iterations of its
engine, then `--iterations` that count, spread over all stages, and one check (running statistics, both measurements).
`seconds` are those of a whole protection: mean iteration × iterations + check × checks, without the checks that a
breach repeats; `mb` is the process's resident memory at the peak (a GPU's, where one is used), data and both models
included. The model is untrained: the time is the same. `against` are the medians ÷ the last preset's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from protection import seconds  # the script beside this one

from holdfast.inputs import Inputs
from holdfast.recipes import load_recipe
from holdfast.records import provenance
from holdfast.runtime import peak_memory_mb, threads


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """One preset, in this process."""
    recipe = load_recipe(arguments.recipe, arguments.presets, arguments.changes)
    inputs, spec = Inputs(recipe), recipe.defence_object
    runtime = inputs.runtime
    with threads(recipe.runtime.threads or 1):
        model = runtime.place(inputs.architecture.build(len(inputs.original.classes)))
        given = inputs.given(model)
        engine = spec.prepare(given)  # type: ignore[attr-defined]  # `main` refuses what has none
        for i in range(1, 1 + arguments.warmup):
            engine.iterate(i, 1.0)
        share = engine.length / arguments.iterations  # the middle of each: stages count by their length
        counted = [1 + int((i + 0.5) * share) for i in range(arguments.iterations)]
        times = [seconds(lambda i=i: engine.iterate(i, 1.0), runtime.device) for i in counted]

        def check() -> None:
            given.settle(1, engine.settling)
            given.original_metric()
            engine.restricted_metric()

        once = seconds(check, runtime.device)
    checks = engine.length // spec.check_every  # type: ignore[attr-defined]
    iteration = sum(times) / len(times)
    return {
        "iteration": iteration,
        "iterations": engine.length,
        "check": once,
        "checks": checks,
        "seconds": iteration * engine.length + once * checks,
        "mb": peak_memory_mb(runtime.device),
    }


def _apart(arguments: argparse.Namespace, preset: str) -> dict[str, float]:
    """The same, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), arguments.recipe, "--presets", preset, "--one"]
    command += [f"--warmup={arguments.warmup}", f"--iterations={arguments.iterations}"]
    command += [part for change in arguments.changes for part in ("--set", change)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="lockout/mnist-usps")
    parser.add_argument("--presets", default="lockout,lockout-sophon,sophon")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments)))
        return
    names = arguments.presets.split(",")
    for name in names:
        if not hasattr(load_recipe(arguments.recipe, name, arguments.changes).defence_object, "prepare"):
            parser.error(f"{name} does not work iteration by iteration")
    rounds = [{name: _apart(arguments, name) for name in names} for _ in range(arguments.repeats)]
    rows: dict[str, Any] = {}
    for name in names:
        own = [r[name] for r in rounds]
        rows[name] = {key: round(statistics.median(o[key] for o in own), 3) for key in own[0]}
        rows[name]["spread"] = round(max(o["seconds"] for o in own) - min(o["seconds"] for o in own), 1)
    for row in rows.values():
        row["against"] = {key: round(row[key] / rows[names[-1]][key], 2) for key in ("seconds", "mb")}
    recipe = load_recipe(arguments.recipe, names[0], arguments.changes)
    facts = provenance(Inputs(recipe).runtime, {})
    print(json.dumps({"recipe": arguments.recipe, "repeats": arguments.repeats, "presets": rows, **facts}, indent=2))


if __name__ == "__main__":
    main()
