"""Memory and traffic of a protection, by arithmetic: `python benchmarks/arithmetic.py`, Markdown; `--check` measures.

States of one process in float32, in units of 4 bytes × P parameters (SOPHON, alternating, Adams everywhere):
model 1, its two Adams 4, simulated learner 1, its Adam 2, its gradient 1, suppression gradient 1, the sum of the
adversary 1, of the loop 1: 12, or 48 bytes a parameter. A joint update has one Adam less and the push: 11.

Activations: bytes of what a forward pass keeps for the backward one, counted on tensors without data, bf16 as half of
float32; of one image (or a sequence of 2,048 tokens: 34·h a token and layer, Korthikanti et al., 2022).

W processes. Replicated: all of it each; traffic of one process a loop and a reinforcement step is one all-reduce each,
2·4P·(W−1)/W. In shards (FSDP2): 1/W of the states, and of the largest block parameters twice (the next is fetched
ahead) and gradients once; every pass gathers twice and scatters once, 3·4P·(W−1)/W, 2·K·N passes a loop.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STATES, FLOAT, GIB = 12, 4, 2**30
GPUS = (1, 8, 64)
K, N = 50, 8


@dataclass(frozen=True)
class Size:
    """Parameters, those of the largest block, and bytes of activations of one sample in bf16."""

    parameters: int
    block: int
    activations: int


def of_network(build: Callable[[], nn.Module], run: Callable[[nn.Module], Any], samples: int = 1) -> Size:
    """Counted on a network without data, which `run` gives so many samples."""
    with torch.device("meta"):
        network = build().train()
        kept: dict[int, int] = {}

        def keep(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if not isinstance(value, nn.Parameter):
                kept[storage._cdata] = storage.nbytes()
                alive.append(storage)
            return value

        alive: list[Any] = []
        own = {p.untyped_storage()._cdata for p in network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            run(network)
        total = sum(n for i, n in kept.items() if i not in own)
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    blocks = [sum(p.numel() for p in b.parameters()) for m in lists for b in m.children() if not _holds(b)]
    return Size(sum(p.numel() for p in network.parameters()), max(blocks), total // (2 * samples))


def _holds(block: nn.Module) -> bool:
    return any(isinstance(m, nn.ModuleList | nn.Sequential) and len(m) for m in block.modules())


def timm_network(name: str, size: int) -> Size:
    """A classifier of timm."""
    import timm

    def build() -> nn.Module:
        return timm.create_model(name, num_classes=10)

    return of_network(build, lambda m: m(torch.empty(2, 3, size, size)), samples=2)  # batch statistics of one are none


def sdxl() -> Size:
    """The U-Net of Stable Diffusion XL, at 1,024 pixels."""
    from diffusers import UNet2DConditionModel

    def build() -> nn.Module:
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )

    def run(network: nn.Module) -> Any:
        more = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        text = torch.empty(1, 77, 2048)
        return network(torch.empty(1, 4, 128, 128), torch.tensor([1]), text, added_cond_kwargs=more)

    return of_network(build, run)


def transformer_7b(layers: int = 32, width: int = 4096, hidden: int = 11008, words: int = 32000) -> Size:
    """A decoder of 7 billion parameters (the widths of LLaMA), one sequence of 2,048 tokens."""
    block = 4 * width**2 + 3 * width * hidden + 2 * width
    return Size(layers * block + 2 * words * width + width, block, 34 * width * 2048 * layers)


MODELS: dict[str, Callable[[], Size]] = {
    "ResNet-50, 224": lambda: timm_network("resnet50", 224),
    "CAFormer-m36, 224": lambda: timm_network("caformer_m36", 224),
    "SDXL's U-Net, 1,024": sdxl,
    "transformer of 7 B, 2,048 tokens": transformer_7b,
}


def table() -> list[str]:
    """Markdown: for each model and number of GPUs, memory a process both ways, and traffic."""
    heads = ["model", "parameters", "activations a sample", "GPUs", "replicated: states", "all-reduce a loop"]
    heads += ["in shards: states, blocks", f"traffic a loop (K = {K}, N = {N})"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, find in MODELS.items():
        size = find()
        for count in GPUS:
            first = [name, f"{size.parameters / 1e6:,.0f} M", f"{size.activations / GIB:.2f} GiB"]
            share = (count - 1) / count
            states = STATES * FLOAT * size.parameters
            cells = [
                str(count),
                f"{states / GIB:.1f} GiB",
                f"{2 * FLOAT * size.parameters * share / GIB:.2f} GiB",
                f"{(states / count + (3 * FLOAT * size.block if count > 1 else 0)) / GIB:.1f} GiB",
                f"{2 * K * N * 3 * FLOAT * size.parameters * share / GIB:,.0f} GiB" if count > 1 else "–",
            ]
            lines.append(f"| {' | '.join(first if count == 1 else [''] * 3)} | {' | '.join(cells)} |")
    return lines


def check() -> dict[str, Any]:
    """One adversary of ResNet-18 at 32×32, 50 images: what the arithmetic says beside what `simulation.py` measures.

    Above the level before the loop there are the learner's Adam 2, the suppression gradient 1 and the sum 1 (learner
    and gradient are there from the round before), and the activations of the larger batch or less.
    """
    size = timm_network("resnet18", 32)
    command = [sys.executable, __file__.replace("arithmetic", "simulation"), "--peak", "resnet18", "loop", "5"]
    blocks = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what is freed is given back
    done = subprocess.run(command, env={**os.environ, **blocks}, capture_output=True, text=True, check=True)
    measured = float(done.stdout.split()[-1])
    states = 4 * FLOAT * size.parameters / 2**20
    return {"states_mib": round(states, 1), "activations_mib": round(50 * size.activations / 2**20, 1)} | {
        "measured_mib": round(measured, 1)
    }


def main() -> None:
    """Print the table, or the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure a small network")
    given = parser.parse_args()
    print(json.dumps(check()) if given.check else "\n".join(table()))


if __name__ == "__main__":
    main()
