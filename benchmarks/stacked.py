"""Several adversaries at once by `torch.func.vmap`, or one after the other: `python benchmarks/stacked.py`.

N small networks with batch normalisation, K plain SGD steps each, on one thread: time one after the other ÷ time
stacked, medians of interleaved pairs. Above 1, stacking pays. In bf16 too, where it works.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from holdfast.errors import one_line
from holdfast.models import Architecture
from holdfast.records import provenance
from holdfast.runtime import Runtime

CASES = ((8, 1, 16, 50, 4), (16, 1, 32, 50, 4), (8, 1, 16, 20, 8))  # size, channels, width, batch, N
STEPS, LR, PAIRS = 10, 1e-3, 5


def seconds(function: Callable[[], None]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(case: tuple[int, int, int, int, int], runtime: Runtime) -> dict[str, Any]:
    """Both ways through the same steps."""
    size, channels, width, batch, count = case
    architecture = Architecture("small_conv", size, channels, options={"width": width})
    networks = [runtime.place(architecture.build(10, i)).train() for i in range(count)]
    inputs, labels = torch.randn(count, batch, channels, size, size), torch.randint(10, (count, batch))
    parameters, buffers = stack_module_state(networks)
    skeleton = architecture.build(10)

    def loss(own: dict[str, Tensor], state: dict[str, Tensor], images: Tensor, targets: Tensor) -> Tensor:
        with runtime.autocast():
            outputs = functional_call(skeleton, (own, state), (images,))
        return F.cross_entropy(outputs.float(), targets)

    gradients = vmap(grad(loss))

    def stacked() -> None:
        own = parameters
        for _ in range(STEPS):
            found = gradients(own, buffers, inputs, labels)
            own = {n: v - LR * found[n] for n, v in own.items()}

    def in_turn() -> None:
        for network, images, targets in zip(networks, inputs, labels, strict=True):
            train(network, runtime.images(images), targets, runtime)

    what = {"size": size, "width": width, "batch": batch, "adversaries": count, "precision": runtime.precision}
    try:
        stacked()
    except RuntimeError as error:
        return {**what, "ratio": None, "why": one_line(error)}
    in_turn()
    ratios = [seconds(in_turn) / seconds(stacked) for _ in range(PAIRS)]
    return {**what, "ratio": round(statistics.median(ratios), 3)}


def train(network: nn.Module, images: Tensor, targets: Tensor, runtime: Runtime) -> None:
    """One adversary."""
    optimiser = torch.optim.SGD(network.parameters(), LR, foreach=True)
    for _ in range(STEPS):
        optimiser.zero_grad(set_to_none=True)
        with runtime.autocast():
            outputs = network(images)
        F.cross_entropy(outputs.float(), targets).backward()
        optimiser.step()


def main() -> None:
    """Print one JSON object."""
    torch.set_num_threads(1)
    runtimes = [Runtime.choose("cpu", "float32"), Runtime.choose("cpu", "bf16")]
    found = [measure(case, runtime) for runtime in runtimes for case in CASES]
    print(json.dumps({"results": found, "pairs": PAIRS, **provenance(runtimes[0], {})}, indent=2))


if __name__ == "__main__":
    main()
