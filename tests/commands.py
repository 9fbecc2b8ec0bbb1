"""The command line in processes of its own, that can be killed, without paying for torch's import each time.

A server (multiprocessing's `forkserver`) imports the package once; every command is a fork of it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by the server: more would be threads, which a fork lacks
FORKS = multiprocessing.get_context("forkserver")
# torch imports torch._dynamo with the first optimiser; none of these starts a thread, so a fork of them is whole.
FORKS.set_forkserver_preload(["holdfast.cli", "holdfast.report.write", "torch._dynamo"])


def _main(arguments: list[str], folder: str, environment: Mapping[str, str], file_size: int | None) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from holdfast.cli import main

    torch.set_num_threads(1)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = ["holdfast", *arguments]
    main()


class Command:
    """`holdfast ARGUMENTS` at work. `file_size`: no file may grow beyond so many bytes, as on a full disk."""

    def __init__(self, *arguments: object, file_size: int | None = None, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp())
        words = [str(a) for a in arguments]
        self.process = FORKS.Process(target=_main, args=(words, str(self.folder), environment, file_size))
        self.process.start()

    def running(self) -> bool:
        return self.process.is_alive()

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, number)

    def finish(self, timeout: float = 240) -> tuple[int, str, str]:
        """Exit status (negative: the signal), what was printed, and the errors."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s")
        out, err = ((self.folder / name).read_text() for name in ("out", "err"))
        shutil.rmtree(self.folder)
        return self.process.exitcode, out, err
