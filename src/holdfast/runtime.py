"""Where and how tensors are computed: device, precision, memory layout, compilation. Decided here and nowhere else."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.distributed import ALONE, Group
from holdfast.errors import UserError, require
from holdfast.memory import MicroBatches, keep_freed, release_freed
from holdfast.sharding import shard

Precision = Literal["auto", "float32", "bf16"]
Compile = bool | Literal["graphs"]
LAG = 8  # steps: enough for a GPU never to wait for the host, few enough to notice early that a run has diverged


@dataclass(frozen=True)
class Runtime:
    """A resolved choice. Make one with `Runtime.choose`.

    `bf16` means autocast: weights, gradients, losses and optimiser state stay in float32. `checkpointing`: activations
    are computed anew in the backward pass (Chen et al., 2016). `compile`: by `torch.compile`; `graphs`: and recorded as
    CUDA graphs, so that a step of fixed shape is one launch. `sharing`: processes that hold every model together, in
    shards, and take their part of every batch. `lag`: after how many steps a loss is looked at (`Ledger`). `micro`
    remembers what fits into memory.
    """

    device: str = "cpu"
    precision: str = "float32"
    channels_last: bool = True
    compile: Compile = False
    checkpointing: bool = False
    lag: int = 0
    sharing: Group = ALONE
    micro: MicroBatches = field(default_factory=MicroBatches, compare=False, repr=False)

    @staticmethod
    def choose(
        device: str = "auto", precision: Precision = "auto", compile: Compile = False, checkpointing: bool = False
    ) -> Runtime:
        """Resolve `auto`.

        bf16 with channels-last wherever the hardware multiplies bf16 (1.6–3 times float32 on such a CPU, more on a
        GPU), float32 elsewhere. `torch.compile` only on request: on a CPU its 17–118 s of compilation rarely pay. On a
        CPU the process keeps what it frees (`keep_freed`).
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":  # each process of torchrun has one of the machine's GPUs
            device = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else device
        kind, _, index = device.partition(":")
        known = device == "cpu" or (kind == "cuda" and (not index or index.isdigit()))
        require(known, f"unknown device '{device}'; valid: auto, cpu, cuda, cuda:N")
        count = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
        if kind == "cuda" and int(index or 0) >= count:
            raise UserError(f"device '{device}' was asked for, but this machine has {count} CUDA devices; valid: cpu")
        if precision == "auto":
            precision = "bf16" if has_fast_bf16(device) else "float32"
        require(precision in ("float32", "bf16"), f"unknown precision '{precision}'; valid: auto, float32, bf16")
        require(compile in (True, False, "graphs"), f"compile must be true, false or graphs, but got '{compile}'")
        if device == "cpu":
            keep_freed()
        return Runtime(device, precision, True, compile, checkpointing, LAG if kind == "cuda" else 0)

    def autocast(self) -> torch.autocast:
        """The context for forward passes."""
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.precision == "bf16")

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and memory layout (in place; returned for chaining). One that processes share is
        moved block by block, and never there as a whole."""
        if self.sharing.count == 1:
            model.to(self.device)
        if self.channels_last and self.sharing.count == 1:  # shards are cut from contiguous tensors
            for module in model.modules():  # only 4-d weights have such a layout
                if isinstance(module, nn.Conv2d):
                    module.to(memory_format=torch.channels_last)
        if self.checkpointing:
            checkpoint_activations(model)
        if self.sharing.count > 1:
            shard(model, self.sharing.count, self.device.split(":")[0])
        if self.compile:
            model.compile(mode="reduce-overhead" if self.compile == "graphs" else None)
        return model

    def begin_step(self) -> None:
        """Said before every training step: what an earlier replay of a CUDA graph returned may now be overwritten."""
        if self.compile == "graphs":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def images(self, batch: Tensor) -> Tensor:
        """A float batch (n, c, h, w) in the layout that the models have."""
        if self.channels_last and batch.ndim == 4:
            return batch.to(self.device, memory_format=torch.channels_last)
        return batch.to(self.device)


def checkpoint_activations(model: nn.Module) -> None:
    """Let timm's and diffusers' networks recompute activations instead of keeping them; `UserError` for others.

    Batch normalisation sees every batch twice then: its running statistics move by 1 − (1 − momentum)² instead of
    momentum.
    """
    if callable(getattr(model, "set_grad_checkpointing", None)):
        model.set_grad_checkpointing()  # type: ignore[operator]
        return
    found = [m for m in model.modules() if callable(getattr(m, "enable_gradient_checkpointing", None))]
    require(
        bool(found),
        f"runtime.checkpointing: {type(model).__name__} cannot recompute its activations; networks of timm and "
        "diffusers can",
    )
    found[0].enable_gradient_checkpointing()  # type: ignore[operator]


def has_fast_bf16(device: str) -> bool:
    """Whether the device has bf16 matrix instructions."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe()) if probe is not None else False


def threads_for(model: nn.Module, size: int) -> int | None:
    """How many intra-op threads train a model fastest on a CPU: one for a small network on small images, where threads
    spend their time waiting for each other (half the speed with two), else torch's own choice (None)."""
    small = sum(p.numel() for p in model.parameters()) < 1_000_000 and size <= 16
    return 1 if small else None


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run a block with `count` intra-op threads; `None` leaves them."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory_mb(device: str = "cpu", children: bool = True) -> float:
    """Peak memory in MB since `reset_peak_memory`, or since the start: resident on a CPU (the process, and its finished
    `children` since the start), allocated on a GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    own = _high_water_kb() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    theirs = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss if children else 0
    return max(own, theirs) / unit


def reset_peak_memory(device: str = "cpu") -> None:
    """Measure the peak from here on. On a CPU only Linux can: elsewhere it stays that since the start."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    release_freed()  # what was freed before is no part of the peak
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _high_water_kb() -> int | None:
    """VmHWM of /proc/self/status; None where there is no such file."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) if found else None
    return None


def hardware(runtime: Runtime) -> dict[str, Any]:
    """What a reader needs to judge a time or a rounding error."""
    return {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(runtime.device) if runtime.device.startswith("cuda") else "cpu",
        "precision": runtime.precision,
        "channels_last": runtime.channels_last,
        "compile": runtime.compile,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
