"""Images a second of one training step, as a share of what the device multiplies: `python benchmarks/rate.py`.

The step is an adversary's (forward, backward, Adam, batches drawn on the device) through `fit`, as it is and with
`runtime.compile` true and `graphs`. `share` is images a second × FLOPs of an image's forward and backward pass ÷ the
measured rate of one large matrix product in the same precision. Medians of `--rounds` rounds, all ways in turn.
On a GPU: `python benchmarks/rate.py --models resnet18 resnet50 caformer_s18 --batch 256 --graphs`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from holdfast.domains import ImageData
from holdfast.finetuning import FineTuning
from holdfast.flops import training_flops
from holdfast.models import Architecture
from holdfast.records import provenance
from holdfast.runtime import Compile, Runtime
from holdfast.tasks import Classification
from holdfast.training import fit, minibatches

CLASSES, IMAGES = 10, 2000


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matrix_rate(runtime: Runtime, side: int, rounds: int) -> float:
    """FLOP/s of a product of two square matrices in the runtime's precision, the median of `rounds`."""
    kind = torch.bfloat16 if runtime.precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=runtime.device, dtype=kind) for _ in range(2))
    times = []
    for _ in range(rounds + 1):
        wait(runtime.device)
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        wait(runtime.device)
        times.append((time.perf_counter() - started) / 10)
    return 2 * side**3 / statistics.median(times[1:])


class Step:
    """Training steps of one model on random images that lie on the device."""

    def __init__(self, name: str, size: int, batch: int, runtime: Runtime) -> None:
        architecture = Architecture(name, size, 3)
        rng = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (IMAGES, 3, size, size), generator=rng).to(torch.uint8)
        labels = torch.arange(IMAGES) % CLASSES
        self.data = ImageData(images, labels, architecture.preprocessing).to(runtime)
        self.runtime, self.batch = runtime, batch
        self.flops = training_flops(architecture.build(CLASSES), architecture.example())
        self.model = runtime.place(architecture.build(CLASSES))
        self.adam = FineTuning(optimiser="adam", lr=1e-4).build_optimiser(self.model.parameters())

    def images_per_second(self, steps: int) -> float:
        """Over `steps` steps."""
        batches = minibatches(self.data, self.batch, steps, 0, self.runtime)
        wait(self.runtime.device)
        started = time.perf_counter()
        task = Classification()
        fit(self.model, batches, task.loss, self.adam, runtime=self.runtime, forward=task.forward)
        wait(self.runtime.device)
        return steps * self.batch / (time.perf_counter() - started)


def measure(
    name: str, size: int, batch: int, steps: int, rounds: int, runtime: Runtime, ways: tuple[Compile, ...], peak: float
) -> dict[str, Any]:
    """All ways of one model; `peak` is the matrix rate in FLOP/s."""
    trained = {way: Step(name, size, batch, replace(runtime, compile=way)) for way in ways}
    for step in trained.values():
        step.images_per_second(3)  # compiles, records, chooses kernels
    rates: dict[Compile, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, step in trained.items():
            rates[way].append(step.images_per_second(steps))
    found = {way: statistics.median(values) for way, values in rates.items()}
    words = {False: "eager", True: "compiled", "graphs": "graphed"}
    return {
        "model": name,
        "size": size,
        "batch": batch,
        "gflops_an_image": round(trained[ways[0]].flops / 1e9, 3),
        "images_per_second": {words[way]: round(value, 1) for way, value in found.items()},
        "share": {words[way]: round(v * trained[way].flops / peak, 3) for way, v in found.items()},
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small_conv", "resnet18"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=None, help="of the matrices; default: 8192 on a GPU, 2048 on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="compiled too")
    parser.add_argument("--graphs", action="store_true", help="compiled and graphed too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runtime = Runtime.choose(arguments.device)
    side = arguments.side or (8192 if runtime.device.startswith("cuda") else 2048)
    peak = matrix_rate(runtime, side, arguments.rounds)
    more: tuple[Compile, ...] = (True,) if arguments.compile or arguments.graphs else ()
    ways: tuple[Compile, ...] = (False, *more, *(("graphs",) if arguments.graphs else ()))
    shape = (arguments.size, arguments.batch, arguments.steps, arguments.rounds)
    results = []
    for name in arguments.models:
        results.append(measure(name, *shape, runtime, ways, peak))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)  # compiling takes minutes: what is known is said
    print(json.dumps({"matrix_tflops": round(peak / 1e12, 3), "results": results, **provenance(runtime, {})}, indent=2))


if __name__ == "__main__":
    main()
