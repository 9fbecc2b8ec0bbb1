"""One seed in, named streams out.

Every random choice is a function of the run's seed and of what it is for ("attack", name, seed, step …), never of what
ran before it. So a run that was killed and resumed makes the same choices as one that was not, and no generator state
has to be saved.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names` of `seed`."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator at the start of the stream `names` of `seed`."""
    return torch.Generator().manual_seed(derive(seed, *names))


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def reseed(value: int) -> None:
    """The global generators of the CPU and of the GPUs in use to the start of `value`, the CPU's like
    `torch.manual_seed`. That also formats a stack trace for every kind of device which is not in use, which can take
    longer than a small network's step."""
    torch.default_generator.manual_seed(value)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(value)


@contextlib.contextmanager
def seeded(seed: int, *names: str | int) -> Iterator[None]:
    """Run a block with torch's global generators at the start of a stream, and put them back afterwards.

    For code that takes no generator: initialisers, dropout, stochastic depth.
    """
    # Only a GPU that is in use: forking the others would open a context on each.
    devices = [torch.cuda.current_device()] if _cuda_in_use() else []
    with torch.random.fork_rng(devices=devices):
        reseed(derive(seed, *names))
        yield
