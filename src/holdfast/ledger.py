"""The losses of past steps, read without waiting for the device."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor


class Ledger:
    """Losses by step, each read `lag` steps later; 0: at once.

    Asking a GPU for a number waits until it has done all that was given to it, and it idles while the next step is
    prepared. So each loss is copied to the host behind the work that made it, and looked at when that was long ago.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.last = math.nan
        self._open: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def note(self, step: int, loss: Tensor) -> tuple[int, float] | None:
        """Take down the loss (a scalar tensor) of `step`; returns the step and value of the first one found not to be
        finite, None as long as there is none."""
        if self.lag == 0:
            self.last = loss.item()
            return None if math.isfinite(self.last) else (step, self.last)
        event = None
        if loss.is_cuda:
            there = torch.empty_like(loss, device="cpu", pin_memory=True)
            loss = there.copy_(loss.detach(), non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._open.append((step, loss, event))
        return self._read() if len(self._open) > self.lag else None

    def settle(self) -> tuple[int, float] | None:
        """Read what is left; returns as `note` does."""
        while self._open:
            found = self._read()
            if found is not None:
                return found
        return None

    def _read(self) -> tuple[int, float] | None:
        step, loss, event = self._open.popleft()
        if event is not None:
            event.synchronize()
        self.last = loss.item()
        return None if math.isfinite(self.last) else (step, self.last)
