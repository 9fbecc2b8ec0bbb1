"""How the command line ends: its exit codes, one line for whatever went wrong, and who of several processes says it."""

from __future__ import annotations

import io
import os
import sys
import time
from contextlib import redirect_stdout
from typing import Any, NoReturn

import typer

from holdfast import stopping
from holdfast.distributed import Told, joined
from holdfast.errors import UserError, one_line
from holdfast.memory import out_of_memory

INTERRUPTED = 130  # the shell's code for SIGINT; typer turns the exception into it
GRACE = 30  # seconds; what all processes stumble over is the first one's to say, and its end is theirs


def exit_with(app: typer.Typer) -> NoReturn:
    """Run `app` and exit: a `UserError` is one line and exit code 2; an interrupt says how to go on."""
    stopping.install()
    try:
        with joined() as group, redirect_stdout(sys.stdout if group.first else io.StringIO()):
            code: Any = app(standalone_mode=False)
    except Told:
        sys.exit(2)
    except UserError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        _fail(f"{one_line(error)}; what was written before is intact, continue with --resume")
    except Exception as error:
        if out_of_memory(error):
            _fail(f"{one_line(error, 160)}; take smaller batches, runtime.checkpointing=true, or fewer --jobs")
        explain = getattr(error, "format_message", None)  # click's own complaints about options and arguments
        if explain is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(explain())
            sys.exit(0)
        _fail(f"{explain()} (see `holdfast --help`)")
    if code == INTERRUPTED:
        code = stopping.TERMINATED if stopping.terminated() else code
        if not _rank():
            print("interrupted; the same command with --resume goes on from the last saved state", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _fail(message: str) -> NoReturn:
    if _rank():
        try:
            if not stopping.terminated():
                time.sleep(GRACE)
        except stopping.Terminated:
            pass
        if stopping.terminated():  # by torchrun: the first process has failed, and said why
            sys.exit(2)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
