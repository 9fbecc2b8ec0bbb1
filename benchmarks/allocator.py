"""What it brings that a process keeps what it frees: `python benchmarks/allocator.py`.

Training steps of the small network (forward, backward, Adam) on random images, by `fit`, in a fresh process each, with
`memory.keep_freed` and by the allocator's defaults in turn. Medians over `--rounds`: ms and page faults a step, peak
memory; the ratio of the times is of neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

import torch

from holdfast.domains import ImageData
from holdfast.memory import keep_freed
from holdfast.models import Architecture
from holdfast.optimisers import adam
from holdfast.records import provenance
from holdfast.runtime import Runtime, has_fast_bf16
from holdfast.tasks import Classification
from holdfast.training import fit, minibatches

CLASSES, IMAGES, WARM = 10, 2000, 10
MODES = ("kept", "defaults")


def measure(kept: bool, size: int, batch: int, steps: int) -> dict[str, float]:
    """One process's figures, after `WARM` steps."""
    runtime = Runtime("cpu", "bf16" if has_fast_bf16("cpu") else "float32")
    if kept:
        keep_freed()
    architecture = Architecture("small_conv", size, 3, options={"stem_stride": 2})
    pixels = torch.randint(0, 256, (IMAGES, 3, size, size), dtype=torch.uint8)
    data = ImageData(pixels, torch.arange(IMAGES) % CLASSES, architecture.preprocessing)
    model, task = runtime.place(architecture.build(CLASSES)), Classification()
    optimiser = adam(list(model.parameters()), 1e-3)

    def run(count: int) -> tuple[float, int]:
        batches = minibatches(data, batch, count, 0, runtime)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        fit(model, batches, task.loss, optimiser, runtime=runtime, forward=task.forward)
        return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    run(WARM)
    seconds, faults = run(steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"ms": 1e3 * seconds / steps, "faults": faults / steps, "peak_mb": peak}


def main() -> None:
    """Print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one == "kept", given.size, given.batch, given.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {m: [] for m in MODES}
    for _ in range(given.rounds):
        for mode in MODES:
            own = [sys.executable, __file__, "--one", mode]
            own += [w for n in ("size", "batch", "steps") for w in (f"--{n}", str(getattr(given, n)))]
            found[mode].append(json.loads(subprocess.run(own, capture_output=True, text=True, check=True).stdout))
    table: dict[str, Any] = {
        mode: {n: round(statistics.median(r[n] for r in rows), 1) for n in rows[0]} for mode, rows in found.items()
    }
    ratios = [k["ms"] / d["ms"] for k, d in zip(found["kept"], found["defaults"], strict=True)]
    table["time, kept ÷ defaults"] = round(statistics.median(ratios), 3)
    table["its range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    if given.json:
        print(json.dumps({**table, "provenance": provenance(Runtime("cpu"), {})}, indent=2))
        return
    for name, values in table.items():
        print(name, values)


if __name__ == "__main__":
    main()
