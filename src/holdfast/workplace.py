"""Where long work keeps its checkpoint and its curves, and says how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.checkpoints import Checkpoint, read_checkpoint
from holdfast.distributed import Group, current
from holdfast.errors import require
from holdfast.files import save_every_seconds
from holdfast.progress import Reporter


@dataclass
class Workplace:
    """Where a defence keeps its checkpoint and curves, and says how far it is. Without a folder, nothing is kept.

    `group`: the processes that share the work. The first one measures, keeps and speaks; the others follow. `sharded`:
    they hold the model together; then all measure, and each keeps its own part.
    """

    folder: Path | None = None
    resume: bool = False
    reporter: Reporter = field(default_factory=lambda: Reporter(quiet=True))
    save_every_seconds: float = field(default_factory=save_every_seconds)
    group: Group = field(default_factory=current)
    sharded: bool = False

    def checkpoint(self, identity: str) -> Checkpoint | None:
        """The checkpoint of the run of that name, where one is kept."""
        if self.folder is None or not (self.group.first or self.sharded):
            return None
        part = f"-{self.group.rank + 1}-of-{self.group.count}" if self.sharded else ""
        return Checkpoint(self.folder / f"checkpoint{part}.pt", identity, self.resume, self.reporter.say)

    def begun(self) -> bool:
        """Whether the folder holds a checkpoint, of however many processes."""
        return bool(self._kept())

    def _kept(self) -> list[str]:
        return sorted(p.name for p in self.folder.glob("checkpoint*.pt")) if self.folder else []

    def _check_alike(self) -> None:
        """`UserError` where what is kept is that of another number of processes: it would be left lying there."""
        part = f"-of-{self.group.count}." if self.sharded else "checkpoint."
        others = [n for n in self._kept() if part not in n] if self.resume else []
        require(
            not others,
            f"{self.folder} holds {', '.join(others[:2])}, of a run with another number of processes or another "
            "runtime.shard; resume it as it was begun, or remove them to begin anew",
        )

    def load(self, checkpoint: Checkpoint | None) -> Mapping[str, Any] | None:
        """What to go on from: the first process's, for all; of shards, everyone's own of the same iteration."""
        self.group.agreed(self._check_alike)
        if not self.sharded:
            return self.group.agreed(lambda: checkpoint.load() if checkpoint else None)
        found = checkpoint.load() if checkpoint else None
        there = found["iteration"] if found else 0
        least = self.group.least(there)
        ahead = checkpoint if there > least > 0 else None  # stopped between two processes' saving
        if ahead:
            found = read_checkpoint(ahead.previous)
        lacking = self.group.any(least > 0 and (found is None or found["iteration"] != least))
        require(not lacking, f"the shards in {self.folder} are not of one iteration; remove them to begin anew")
        if ahead:
            ahead.path.unlink(missing_ok=True)  # or the next save would put it in the place of the common one
        return found if least else None


Write = Callable[[str, float, int], None]


@contextmanager
def curves(workplace: Workplace) -> Iterator[Write]:
    """A writer of TensorBoard scalars; without a folder, one that does nothing."""
    if workplace.folder is None or not workplace.group.first:
        yield lambda *_: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(workplace.folder / "tensorboard"))
    try:
        yield lambda name, value, step: writer.add_scalar(name, value, step)
    finally:
        writer.close()
