"""Out of memory: the batch is worked on in parts, with the same gradient, instead of dying. What was freed is kept."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from holdfast.errors import UserError

SAID = r"can't allocate memory|bad_alloc|could not (create|execute) a primitive(?! desc)"  # as a RuntimeError
Part = Callable[[Tensor, Tensor, float], Tensor]

TRIM, THRESHOLD = -1, -3  # parameters of mallopt(3)
LIMITS = (2**30, 2**25)  # in bytes; older versions of glibc refuse a threshold of more than 32 MiB


def keep_freed() -> None:
    """Let this process keep what it frees for what it allocates next, until `release_freed`: on a CPU, with glibc.

    By its defaults glibc gives large blocks back to the system as they are freed. A training step frees and allocates
    its activations and gradients, and the system clears their pages anew, in every step: a seventh of its time with a
    small network (`benchmarks/allocator.py`), and no less memory at the peak. Results are the same bits.
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        option = ctypes.CDLL(None).mallopt
        option(TRIM, LIMITS[0])
        any(option(THRESHOLD, limit) for limit in LIMITS)  # 1: accepted


def release_freed() -> None:
    """Give back to the system what this process has freed and kept, for work of another size or another process."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class MicroBatches:
    """How many samples at once have turned out to fit into memory; `most` is None as long as all did.

    Σ over the parts of share · (mean loss of a part) is the mean loss of the batch, and so is its gradient. Only what
    looks at a batch as a whole differs: batch statistics are those of a part, dropout and noise are drawn anew.
    """

    def __init__(self) -> None:
        self.most: int | None = None

    def run(self, inputs: Tensor, targets: Tensor, work: Part, again: Callable[[], object] = lambda: None) -> Tensor:
        """Σ of `work(inputs, targets, share)` over the parts of a batch (n, …), (n,); `share` is the part's of n.

        Where memory runs out the parts are halved, `again` is called to undo what was done, and the batch begins anew.
        `UserError` where one sample is too much.
        """
        while True:
            size = min(len(targets), self.most or len(targets))
            try:
                return self._parts(inputs, targets, work, size)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                said = str(error).split("\n")[0] or type(error).__name__
            self._halve(size, said)  # outside of the handler, which would keep the failed step's tensors alive
            again()

    def _parts(self, inputs: Tensor, targets: Tensor, work: Part, size: int) -> Tensor:
        count = len(targets)
        if size == count:
            return work(inputs, targets, 1.0)
        pairs = zip(inputs.split(size), targets.split(size), strict=True)  # type: ignore[no-untyped-call]
        return torch.stack([work(i, t, len(t) / count) for i, t in pairs]).sum(0)

    def _halve(self, size: int, said: str) -> None:
        if size == 1:
            raise UserError(
                f"out of memory with one sample at a time ({said[:120]}); take a smaller model or "
                "input, or begin with a smaller batch"
            )
        self.most = (size + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(
            f"out of memory with {size} samples at once: from here on at most {self.most}, gradients are summed "
            "(batch statistics are those of a part)",
            file=sys.stderr,
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has said no: torch's, on a GPU or a CPU, Python's (C++'s too) or oneDNN's.

    oneDNN makes a primitive after it has found one that fits the operands ("primitive descriptor"): what can still
    fail then is the memory for its code and its scratch space.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return bool(re.search(SAID, str(error)))
