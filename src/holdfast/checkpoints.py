"""Checkpoints of long work: whole or absent, verified by hash, the last two kept."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from holdfast.errors import UserError, require
from holdfast.files import cannot_write, load_torch, save_torch

DIGEST = "sha256"
SHARE = 0.05  # of the time, at most, goes into saving


@dataclass(frozen=True)
class Checkpoint:
    """Where one piece of work keeps its state (`path`, and the one before beside it), the name of the run that it
    belongs to, and whether to go on from it. `say` gets one line when a damaged file is passed over."""

    path: Path
    identity: str = ""
    resume: bool = False
    say: Callable[[str], None] = lambda _: None

    @property
    def previous(self) -> Path:
        """The state before the last."""
        return self.path.with_suffix(f".previous{self.path.suffix}")

    def exists(self) -> bool:
        """Whether there is anything to go on from."""
        return self.path.exists() or self.previous.exists()

    def save(self, value: Mapping[str, Any]) -> None:
        """Write `value` with its hash; what was the last becomes the one before. A disk that refuses (`UserError`), or
        a crash at any moment, leaves at least one whole file."""
        content = {"identity": self.identity, **value}
        written = self.path.with_suffix(f".new{self.path.suffix}")
        for torn in self.path.parent.glob(f".{glob.escape(written.name)}.*"):  # left by `kill -9` in the midst of one
            with contextlib.suppress(OSError):
                torn.unlink()
        save_torch(written, {**content, DIGEST: digest(content)})
        try:
            if self.path.exists():
                os.replace(self.path, self.previous)
            os.replace(written, self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def load(self) -> dict[str, Any] | None:
        """The last state that is whole; None where there is none, or where the run is not to go on. `UserError` for
        another run's, or where all there is is damaged."""
        if not self.resume:
            return None
        failed: UserError | None = None
        for path in (p for p in (self.path, self.previous) if p.exists()):
            try:
                found = read_checkpoint(path)
            except UserError as error:
                failed = failed or error
                continue
            require(
                found.get("identity") == self.identity,
                f"{path} is the checkpoint of another run (other recipe, weights or data); choose another --out",
            )
            if failed is not None:
                self.say(f"{failed}; going on from the checkpoint before it, {path.name}")
                with contextlib.suppress(OSError):  # or the next save would put it in the place of the good one
                    self.path.unlink()
            return found
        if failed is not None:
            raise failed
        return None


class Clock:
    """When long work saves next: every `seconds`, more seldom where saving takes long; with 0 after every step."""

    def __init__(self, seconds: float) -> None:
        self.seconds = self.pause = seconds
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() - self.last > self.pause

    def save(self, save: Callable[[], None]) -> None:
        """Call `save`, and start anew."""
        began = time.monotonic()
        save()
        self.last = time.monotonic()
        self.pause = max(self.seconds, (self.last - began) / SHARE) if self.seconds > 0 else self.seconds


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A file that `Checkpoint.save` wrote; `UserError` where it is not what was written."""
    found = load_torch(path)
    require(isinstance(found, dict), f"cannot read {path}: it holds no checkpoint")
    content = {k: v for k, v in found.items() if k != DIGEST}
    require(found.get(DIGEST) == digest(content), f"cannot read {path}: its content is not what its hash says")
    return content


def digest(value: Any) -> str:
    """SHA-256 of nested mappings, sequences, tensors and plain values, in hexadecimal. Bit for bit: −0 is not 0."""
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        found.update(f"tensor {plain.dtype} {tuple(plain.shape)} ".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        found.update(f"mapping {len(value)} ".encode())
        for key, inner in value.items():
            found.update(f"{key!r} ".encode())
            _feed(found, inner)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        found.update(f"sequence {len(value)} ".encode())
        for inner in value:
            _feed(found, inner)
    else:
        found.update(f"{value!r} ".encode())
