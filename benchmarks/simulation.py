"""Speed and memory of simulated fine-tuning: `python benchmarks/simulation.py --json`.

For each model, one JSON object:

- `time_ratio_to_passes`: one FTS loop of K inner steps ÷ the same number of plain passes (K forward–backward–steps on
  adapting batches and K forward–backwards on held-out ones), medians of interleaved pairs; goal ≤ 1.10
- `memory_ratio_k100_k5`: peak memory of a loop with K = 100 ÷ one with K = 5; goal ≤ 1.05
- `speed_ratio_to_unroll`, `memory_ratio_to_unroll`: a straightforward unroll that keeps its K graphs ÷ ours (time), and
  ours ÷ the unroll (peak memory), in the same run
- `speed_ratio_to_published`, `memory_ratio_to_published`: the same against the published way, which is that unroll in
  float32, without channels-last, at K = 50; goals ≥ 2 and ≤ 1/10 (small network), ≥ 1.5 and ≤ 1/5 (ResNet-18, 64×64).
  Our adversary steps with Adam, the published one with plain SGD; `…_sgd` is the ratio where ours does too
- `seconds_a_step`: of a loop ÷ K, for several K; `seconds_an_adversary`: ÷ N, for several N. Linear is constant here

Peak memory on a CPU is the resident size of a fresh process for each measurement, above that process's level before
the loop; on a GPU it is what the allocator handed out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A fixed threshold keeps glibc from holding freed blocks back, which would blur peaks between K = 5 and K = 50.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "65536")

import torch
from torch import Tensor, nn
from torch.func import functional_call

from holdfast.domains import ImageData
from holdfast.finetuning import FineTuning
from holdfast.losses import inverse_cross_entropy
from holdfast.models import Architecture
from holdfast.optimisers import adam
from holdfast.records import provenance
from holdfast.runtime import Runtime
from holdfast.simulation import Accumulator, Simulator, step_weights
from holdfast.tasks import Classification

MODELS = {
    "small_conv": (Architecture("small_conv", 32, 3), 100),
    "resnet18": (Architecture("resnet18", 32, 3), 50),
    "resnet18-64": (Architecture("resnet18", 64, 3), 20),
}
PUBLISHED_K = 50
LONG = (25, 50, 100, 200)  # K of the timed loops
MANY = (1, 2, 4)  # N
CLASSES = 10
LR = 1e-3


class Bench:
    """A model, random images of the right shape, and the three ways to spend K inner steps."""

    def __init__(self, name: str, runtime: Runtime) -> None:
        self.architecture, self.batch = MODELS[name]
        rng = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (1000, 3, self.architecture.size, self.architecture.size), generator=rng)
        labels = torch.arange(1000) % CLASSES
        data = ImageData(images.to(torch.uint8), labels, self.architecture.preprocessing).to(runtime)
        learner = runtime.place(self.architecture.build(CLASSES))
        self.state = self.architecture.build(CLASSES).state_dict()
        self.runtime = runtime
        self.simulator = Simulator(learner, self.architecture, CLASSES, data, Classification(), runtime, 0.2)
        self.held_size = round(self.batch * 0.25)
        self.data = data

    def loop(self, k: int, optimiser: str = "adam") -> None:
        """One simulated adversary of K steps, as SOPHON runs it."""
        tuning = FineTuning(optimiser=optimiser, lr=LR, weight_decay=0.0, batch_size=self.batch, steps=k)
        self.simulator.simulate(self.state, tuning, step_weights("uniform", k), inverse_cross_entropy, Accumulator(), 0)

    def batches(self, k: int, size: int) -> list[tuple[Tensor, Tensor]]:
        return [self.data.batch(torch.arange(i * 7, i * 7 + size) % len(self.data), self.runtime) for i in range(k)]

    def passes(self, k: int) -> None:
        """K forward–backward–steps and K forward–backwards, and nothing else but making the batches."""
        model = self.simulator.learner.train()
        optimiser = adam(model.parameters(), LR)
        for i in range(k):
            for size, step in ((self.batch, True), (self.held_size, False)):
                where = torch.arange(i * 7, i * 7 + size) % len(self.data)
                inputs, labels = self.data.batch(where, self.runtime)
                optimiser.zero_grad(set_to_none=True)
                with self.runtime.autocast():
                    outputs = model(inputs)
                nn.functional.cross_entropy(outputs.float(), labels).backward()
                if step:
                    optimiser.step()

    def unroll(self, k: int) -> None:
        """First-order MAML written down as it stands: adapted weights as a graph, one backward at the end."""
        model = self.simulator.learner.train()
        theta = {n: p.detach().requires_grad_(True) for n, p in model.named_parameters()}
        adapted, total = dict(theta), torch.zeros((), device=self.runtime.device)
        adapt, held = self.batches(k, self.batch), self.batches(k, self.held_size)
        for (x, y), (xt, yt) in zip(adapt, held, strict=True):
            with self.runtime.autocast():
                outputs = functional_call(model, adapted, (x,))
            loss = nn.functional.cross_entropy(outputs.float(), y)
            grads = torch.autograd.grad(loss, list(adapted.values()), retain_graph=True)
            adapted = {n: p - LR * g.detach() for (n, p), g in zip(adapted.items(), grads, strict=True)}
            with self.runtime.autocast():
                outputs = functional_call(model, adapted, (xt,))
            total = total + inverse_cross_entropy(outputs, yt) / k
        torch.autograd.grad(total, list(theta.values()))


def seconds(function: Callable[[], None]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(first: Callable[[], None], second: Callable[[], None], pairs: int) -> float:
    """Median of first ÷ second over pairs timed one after the other, after one warm-up each."""
    first(), second()
    return statistics.median(seconds(first) / seconds(second) for _ in range(pairs))


def peak_above_start_mb(name: str, what: str, k: int, runtime: Runtime) -> float:
    """Peak memory of `what` above the level before it, in MB."""
    bench = Bench(name, runtime)
    getattr(bench, what)(2)  # libraries load, kernels choose their scratch
    if runtime.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        getattr(bench, what)(k)
        return float((torch.cuda.max_memory_allocated() - start) / 2**20)
    reset_peak()
    start_mb = status_mb("VmRSS")
    getattr(bench, what)(k)
    return status_mb("VmHWM") - start_mb


def reset_peak() -> None:
    """Forget this process's peak so far (Linux)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def status_mb(key: str) -> float:
    """A line of /proc/self/status in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key))


def in_fresh_process(name: str, what: str, k: int, arguments: argparse.Namespace, *more: str) -> float:
    """`peak_above_start_mb` in a process of its own: an allocator remembers."""
    command = [sys.executable, __file__, "--peak", name, what, str(k)]
    command += ["--device", arguments.device, "--precision", arguments.precision, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def measure(name: str, arguments: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """All figures of one model."""
    bench, k = Bench(name, runtime), arguments.steps
    to_passes = interleaved(lambda: bench.loop(k), lambda: bench.passes(k), arguments.pairs)
    to_unroll = interleaved(lambda: bench.unroll(k), lambda: bench.loop(k), max(1, arguments.pairs // 2))
    peaks = {
        key: statistics.median(in_fresh_process(name, what, n, arguments) for _ in range(3))
        for key, what, n in (("k5", "loop", 5), ("k100", "loop", 100), ("unroll", "unroll", k))
    }
    own = in_fresh_process(name, "loop", k, arguments)
    published = against_published(name, arguments, runtime) if arguments.published else {}
    linear = linearity(bench) if arguments.linear else {}
    return {
        "model": name,
        "batch": bench.batch,
        "inner_steps": k,
        "time_ratio_to_passes": round(to_passes, 3),
        "speed_ratio_to_unroll": round(to_unroll, 3),
        "memory_ratio_k100_k5": round(peaks["k100"] / peaks["k5"], 3),
        "memory_ratio_to_unroll": round(own / peaks["unroll"], 3),
        "peak_mb_above_start": {n: round(v, 1) for n, v in peaks.items()},
        **published,
        **linear,
    }


def against_published(name: str, arguments: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """One loop of ours and one of theirs, in turn; their peak and ours, in fresh processes."""
    k, pairs = PUBLISHED_K, max(1, arguments.pairs // 3)
    ours, theirs = Bench(name, runtime), Bench(name, Runtime(runtime.device, "float32", channels_last=False))
    speed = interleaved(lambda: theirs.unroll(k), lambda: ours.loop(k), pairs)
    alike = interleaved(lambda: theirs.unroll(k), lambda: ours.loop(k, "sgd"), pairs)
    peaks = [in_fresh_process(name, what, k, arguments, *more) for what, more in WAYS.items()]
    return {
        "published_inner_steps": k,
        "speed_ratio_to_published": round(speed, 3),
        "speed_ratio_to_published_sgd": round(alike, 3),
        "memory_ratio_to_published": round(peaks[0] / peaks[1], 3),
        "published_peak_mb": round(peaks[1], 1),
    }


WAYS = {"loop": (), "unroll": ("--precision", "float32", "--contiguous")}


def linearity(bench: Bench, rounds: int = 5) -> dict[str, Any]:
    """Seconds a step and an adversary: medians of rounds over all K and all N, so that slow minutes touch all alike."""
    bench.loop(LONG[0])
    long: dict[int, list[float]] = {k: [] for k in LONG}
    many: dict[int, list[float]] = {n: [] for n in MANY}
    for _ in range(rounds):
        for k, found in long.items():
            found.append(seconds(lambda k=k: bench.loop(k)) / k)
        for n, found in many.items():
            found.append(seconds(lambda n=n: [bench.loop(LONG[0]) for _ in range(n)]) / n)
    return {
        "seconds_a_step": {k: round(statistics.median(v), 5) for k, v in long.items()},
        "seconds_an_adversary": {n: round(statistics.median(v), 4) for n, v in many.items()},
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON (the default; kept for scripts)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=20, help="K of the timed loops and of the unroll")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--published", action="store_true", help="against the published way too: minutes, gigabytes")
    parser.add_argument("--linear", action="store_true", help="seconds a step for K up to 200 too")
    parser.add_argument("--contiguous", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=3, metavar=("MODEL", "WHAT", "K"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runtime = replace(Runtime.choose(arguments.device, arguments.precision), channels_last=not arguments.contiguous)
    if arguments.peak:
        name, what, k = arguments.peak
        print(peak_above_start_mb(name, what, int(k), runtime))
        return
    results = []
    for name in arguments.models:
        results.append(measure(name, arguments, runtime))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)  # minutes each: nothing is lost with the next
    print(json.dumps({"results": results, "pairs": arguments.pairs, **provenance(runtime, {})}, indent=2))


if __name__ == "__main__":
    main()
