"""SIGTERM, as schedulers send it: the step at hand is finished and saved, then the process ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED = 128 + signal.SIGTERM  # the shell's code for it
_state = {"asked": False, "busy": 0}


class Terminated(KeyboardInterrupt):
    """SIGTERM, where an interrupt is due: all that cleans up after Ctrl-C does so after this one too."""


def install() -> None:
    """Take SIGTERM from now on: at once where nothing is `unfinished`, else as soon as it is finished."""
    signal.signal(signal.SIGTERM, _terminate)


def terminated() -> bool:
    """Whether SIGTERM has come."""
    return _state["asked"] != 0


def _terminate(*_: Any) -> None:
    _state["asked"] = True
    if not _state["busy"]:
        raise Terminated


@contextmanager
def unfinished(agreed: Callable[[bool], bool] = bool) -> Iterator[Callable[[Callable[[], None]], None]]:
    """A block in which SIGTERM waits until what it yields is called: with a function that saves, between two steps.
    `agreed` makes of one process's wish to stop everyone's, where several work together. One that comes after the
    last step is due at the block's end."""
    _state["busy"] += 1

    def between_steps(save: Callable[[], None]) -> None:
        if agreed(terminated()):
            _state["asked"] = True  # of another process, perhaps
            save()
            agreed(True)  # the others' end would be taken for a failure, and cut short what is still saving
            raise Terminated

    try:
        yield between_steps
    finally:
        _state["busy"] -= 1
    if not _state["busy"] and agreed(terminated()):
        _state["asked"] = True
        raise Terminated
