"""Where long work keeps its checkpoint and its curves, and says how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.checkpoints import Checkpoint
from holdfast.distributed import Group, current
from holdfast.files import save_every_seconds
from holdfast.progress import Reporter


@dataclass
class Workplace:
    """Where a defence keeps its checkpoint and curves, and says how far it is. Without a folder, nothing is kept.

    `group`: the processes that share the work. The first one measures, keeps and speaks; the others follow.
    """

    folder: Path | None = None
    resume: bool = False
    reporter: Reporter = field(default_factory=lambda: Reporter(quiet=True))
    save_every_seconds: float = field(default_factory=save_every_seconds)
    group: Group = field(default_factory=current)

    def checkpoint(self, identity: str) -> Checkpoint | None:
        """The checkpoint of the run of that name, where one is kept."""
        if self.folder is None or not self.group.first:
            return None
        return Checkpoint(self.folder / "checkpoint.pt", identity, self.resume, self.reporter.say)


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
