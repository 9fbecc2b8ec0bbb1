"""Cells of an audit per minute, by who does the work: `python benchmarks/audit.py --json`.

The same cells (one attack, `--steps` steps, random images) one by one in one process with one thread, in one process
with all threads, in one-thread processes (`--jobs`), and on a local Ray with as many workers. Each way is timed in
turn, `--rounds` times; medians; `ratio` is against one by one with one thread. What starting workers costs is given
apart. `--dispatch 2000`: instead, milliseconds that a cell costs which does nothing, of so many.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from holdfast.attacks.attack import Attack
from holdfast.cells import Bench, CellSpec, Ground, run_cell
from holdfast.domains import ImageData
from holdfast.finetuning import FineTuning
from holdfast.models import Architecture, state_of
from holdfast.records import provenance
from holdfast.runtime import Runtime, threads
from holdfast.tasks import Classification
from holdfast.workers import run_all

MODELS = {
    "small_conv": Architecture("small_conv", 16, 1, options={"stem_stride": 2}),
    "resnet18": Architecture("resnet18", 32, 3),
}
CLASSES = 10


def make_bench(name: str, steps: int, images: int = 500) -> Bench:
    """A bench with random images: what is learned does not matter, what it costs does."""
    architecture = MODELS[name]
    rng = torch.Generator().manual_seed(0)

    def data(count: int) -> ImageData:
        shape = (count, architecture.channels, architecture.size, architecture.size)
        pixels = torch.randint(0, 256, shape, generator=rng).to(torch.uint8)
        return ImageData(pixels, torch.arange(count) % CLASSES, architecture.preprocessing)

    ground = Ground((data(200),), data(images), data(images), CLASSES)
    state = state_of(architecture.build(CLASSES))
    runtime = Runtime.choose("cpu")
    states = {"protected": state, "clean": state}
    return Bench(states, architecture, CLASSES, ground, Classification(), runtime, steps, 6, "benchmark")


def make_cells(count: int, steps: int) -> list[CellSpec]:
    """`count` cells that differ in their learning rates alone."""
    attacks = [
        Attack(f"a{i}", FineTuning("head", optimiser="adam", lr=1e-5 * (i + 1), steps=steps)) for i in range(count)
    ]
    return [CellSpec("clean", a, (a.name,), (False,), 0) for a in attacks]


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def one_process(bench: Bench, cells: Sequence[CellSpec], count: int | None) -> None:
    """All cells in this process, with `count` threads (None: torch's own choice)."""
    with threads(count):
        for cell in cells:
            run_cell(bench, cell)


def imported() -> str:
    """For a worker: import what a cell needs."""
    import holdfast.cells

    return holdfast.cells.__name__


def start_ray(jobs: int) -> float:
    """Seconds that a local Ray takes to start and to import what a cell needs."""
    import ray

    def begin() -> None:
        ray.init(num_cpus=jobs, include_dashboard=False, log_to_driver=False)
        ray.get([ray.remote(imported).remote() for _ in range(2 * jobs)])

    return timed(begin)


def nothing(bench: Bench, spec: CellSpec) -> str:
    """A cell without work."""
    return spec.names[0]


def dispatch(name: str, cells: int, jobs: int) -> dict[str, Any]:
    """What it costs to hand out a cell and to take its result, once the workers are there."""
    bench, specs = make_bench(name, 1), make_cells(cells, 1)
    start_ray(jobs)
    list(run_all(nothing, bench, specs[:jobs], jobs))
    found: dict[str, Any] = {"model": name, "cells": cells, "jobs": jobs}
    for way, ray in (("processes", None), ("ray", "auto")):
        started = time.perf_counter()
        results = list(run_all(nothing, bench, specs, jobs, ray))
        found[f"{way}_ms"] = round(1000 * (time.perf_counter() - started) / cells, 2)
        assert sorted(results) == sorted(s.names[0] for s in specs)
    return found


def measure(name: str, cells: int, steps: int, jobs: int, rounds: int, with_ray: bool) -> dict[str, Any]:
    """Medians for one model, every way in turn."""
    bench, specs = make_bench(name, steps), make_cells(cells, steps)
    cores = torch.get_num_threads()
    ways: dict[str, Callable[[], Any]] = {
        "one by one, 1 thread": lambda: one_process(bench, specs, 1),
        f"one by one, {cores} threads": lambda: one_process(bench, specs, cores),
        f"{jobs} processes, 1 thread each": lambda: list(run_all(run_cell, bench, specs, jobs)),
    }
    found: dict[str, Any] = {}
    if with_ray:
        found["ray_start_seconds"] = round(start_ray(jobs), 2)
        ways[f"Ray, {jobs} workers"] = lambda: list(run_all(run_cell, bench, specs, jobs, "auto"))
    one_process(bench, specs[:1], 1)  # warm
    # The workers' start, with their imports; an audit pays it once, for its searches and cells together.
    found["process_start_seconds"] = round(timed(lambda: list(run_all(run_cell, bench, specs[:jobs], jobs))), 2)
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, work in ways.items():
            taken[way].append(timed(work))
    medians = {way: statistics.median(seconds) for way, seconds in taken.items()}
    base = medians["one by one, 1 thread"]
    found["ways"] = {
        way: {"cells_per_minute": round(60 * cells / s, 1), "ratio": round(base / s, 3)} for way, s in medians.items()
    }
    return {"model": name, "cells": cells, "steps": steps, "rounds": rounds, **found}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["small_conv"])
    parser.add_argument("--cells", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--dispatch", type=int, help="so many cells that do nothing")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    given = parser.parse_args()
    if given.dispatch:
        for name in given.models:
            print(json.dumps(dispatch(name, given.dispatch, given.jobs)))
        return
    for name in given.models:
        found = measure(name, given.cells, given.steps, given.jobs, given.rounds, not given.no_ray)
        if given.json:
            print(json.dumps({**found, "provenance": provenance(Runtime.choose("cpu"), {})}))
            continue
        print(f"{name}: {found['cells']} cells of {found['steps']} steps, medians of {found['rounds']}")
        for way, value in found["ways"].items():
            print(f"  {way:<32} {value['cells_per_minute']:>8.1f} cells/min  {value['ratio']:.2f}×")
        if "ray_start_seconds" in found:
            print(f"  Ray's start: {found['ray_start_seconds']} s")


if __name__ == "__main__":
    main()
