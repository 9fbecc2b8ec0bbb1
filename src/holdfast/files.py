"""Files that are either whole or absent, and output folders that belong to one run."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from holdfast.errors import UserError, one_line, require


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between.

    Raises `UserError` where the disk refuses (full, read-only, quota); the old file then stands.
    """
    content = data.encode() if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """The one line for a write that the disk refused."""
    reason = error.strerror or one_line(error)
    return UserError(f"cannot write {path}: {reason}; what was written before is intact, continue with --resume")


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parsed JSON; `UserError` where the file is missing or is no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"file not found: {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {one_line(error)}") from None


def save_torch(path: Path, value: Any) -> None:
    """`torch.save`, atomically. For our own checkpoints only: they are read back with `weights_only=True`."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomic(path, buffer.getvalue())


def save_every_seconds() -> float:
    """How often long work saves its state: `HOLDFAST_SAVE_SECONDS`, default 20."""
    try:
        return float(os.environ.get("HOLDFAST_SAVE_SECONDS", "20"))
    except ValueError:
        raise UserError("HOLDFAST_SAVE_SECONDS must be a number of seconds") from None


def load_torch(path: Path) -> Any:
    """Read a file of tensors without running any code in it (`weights_only=True`)."""
    require(path.is_file(), f"file not found: {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader error means the same to the user: this file is no checkpoint
        raise UserError(
            f"cannot read {path}: it is truncated, or not a file of plain tensors "
            f"(expected safetensors, or a state dict that loads with weights_only=True): {one_line(error, 120)}"
        ) from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Twelve hexadecimal digits that name a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait for other processes in such a block on the same lock file, then hold it; released even by `kill -9`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class RunFolder:
    """`--out DIR` of one run. `claim` makes and holds it ours; every stage keeps its files below it."""

    path: Path

    @property
    def manifest(self) -> Path:
        return self.path / "run.json"

    def check(self, identity: dict[str, Any], resume: bool = False, before: Iterable[Mapping[str, Any]] = ()) -> None:
        """`UserError` where the folder is not free for the run that `identity` describes. Nothing is written.

        A new or empty folder is free, and one that holds the same run; to `resume`, also one of those `before`, whose
        results stand in this one.
        """
        mine = fingerprint(identity)
        if self.manifest.exists():
            held = read_json(self.manifest)
            theirs = held.get("fingerprint") if isinstance(held, dict) else None
            require(
                theirs == mine or (resume and theirs in [fingerprint(b) for b in before]),
                f"{self.path} belongs to another run ({_title(held)}, fingerprint {theirs}; this one is {mine}"
                f"{_differing(held, identity)}); choose another --out, or run with the recipe and options that made it",
            )
            return
        if self.path.exists():
            require(self.path.is_dir(), f"--out must be a folder, but {self.path} is a file")
            others = [p.name for p in self.path.iterdir() if p.name != ".lock"]
            require(
                not others,
                f"{self.path} is not empty and holds no run of holdfast (found {', '.join(sorted(others)[:3])}); "
                "choose a new folder",
            )

    @contextlib.contextmanager
    def claim(
        self, identity: dict[str, Any], resume: bool = False, before: Collection[Mapping[str, Any]] = ()
    ) -> Iterator[None]:
        """Take the folder for a run, or refuse it untouched, and hold it for the length of the block. See `check`."""
        self.check(identity, resume, before)
        with self.lock():
            self.check(identity, resume, before)
            if not self.manifest.exists() or read_json(self.manifest)["fingerprint"] != fingerprint(identity):
                write_json(self.manifest, {"schema": 1, "fingerprint": fingerprint(identity), **identity})
            yield

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against a second process for the length of the block; released even by `kill -9`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.path} is in use by another holdfast process; wait for it or stop it") from None
            yield


def _differing(held: Any, identity: Mapping[str, Any], most: int = 3) -> str:
    """Which settings of two runs differ, there and here: `; defence.iterations was 90, is 40`."""
    theirs, ours = (
        _flat(r if isinstance(r, dict) else {}) for r in (held, json.loads(json.dumps(identity, default=str)))
    )
    for known in ("schema", "fingerprint"):
        theirs.pop(known, None)
    names = [n for n in {**theirs, **ours} if theirs.get(n) != ours.get(n)]
    if "recipe.defence.name" in names:  # then all its fields differ
        names = [n for n in names if n == "recipe.defence.name" or not n.startswith("recipe.defence.")]
    names.sort(key=lambda n: n in ("recipe.name", "recipe.description"))
    said = [f"{n.removeprefix('recipe.')} was {_short(theirs, n)}, is {_short(ours, n)}" for n in names[:most]]
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return f"; {', '.join(said)}{more}" if said else ""


def _short(values: Mapping[str, Any], name: str, most: int = 40) -> str:
    text = str(values[name]) if name in values else "absent"
    return text if len(text) <= most else text[: most - 1] + "…"


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{above}{key}.") if isinstance(inner, dict) else {f"{above}{key}": inner}
    return found


def _title(held: Any) -> str:
    recipe = held.get("recipe", {}) if isinstance(held, dict) else {}
    return f"'{recipe.get('name', 'unnamed')}'" if isinstance(recipe, dict) else "unnamed"
