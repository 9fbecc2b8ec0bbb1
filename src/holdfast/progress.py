"""Progress for people: a live line on a terminal, plain lines in a log. What, how far, how long still."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from holdfast.distributed import current

REFRESH = 0.2  # seconds between notes on a terminal


class Reporter:
    """Where progress goes. `Reporter(quiet=True)` says nothing; of several processes only the first one speaks."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        silent = quiet or not current().first
        self.console = Console(file=stream or sys.stderr, quiet=silent, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    def bar(self, what: str, total: int, done: int = 0) -> Bar:
        """A bar to be used as a context; `advance` it as work is done."""
        return Bar(self.console, what, total, done)


class Bar:
    """A progress bar on a terminal; elsewhere a line whenever `every` seconds have gone by since the last."""

    def __init__(self, console: Console, what: str, total: int, done: int, every: float = 10.0) -> None:
        self.console, self.what, self.total, self.first, self.done = console, what, total, done, done
        self.every, self.note = every, ""
        self.unread: Callable[[], str] | None = None
        self.told: tuple[int, str] | None = None  # the last line, outside a terminal
        self.started = self.printed = time.monotonic()
        self.live: Progress | None = None

    def __enter__(self) -> Bar:
        if self.console.is_terminal:
            width = 2 * len(str(self.total)) + 1
            self.live = Progress(
                TextColumn("{task.description}", table_column=Column(min_width=len(self.what))),
                BarColumn(None, table_column=Column(min_width=6, max_width=24, ratio=1)),
                MofNCompleteColumn(table_column=Column(min_width=width)),
                TimeElapsedColumn(table_column=Column(min_width=7)),
                TextColumn("left", table_column=Column(min_width=4)),
                TimeRemainingColumn(table_column=Column(min_width=7)),
                TextColumn("{task.fields[note]}", table_column=Column(ratio=4, no_wrap=True, overflow="ellipsis")),
                console=self.console,
                expand=True,
            )
            self.live.start()
            self.task = self.live.add_task(self.what, total=self.total, completed=self.done, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
        elif self.done > self.first and self.told != self._now():
            self._print()

    def update(self, done: int, note: str | Callable[[], str] | None = None) -> None:
        """`done` of `total` are done; `note` is what to know about it. One that costs something to find comes as a
        function, which is asked only when the note is shown."""
        self.done = done
        if callable(note):
            self.unread = note
        elif note is not None:
            self.note, self.unread = note, None
        now = time.monotonic()
        if self.live is not None:
            if now - self.printed >= REFRESH:
                self._read()
                self.printed = now
            self.live.update(self.task, completed=done, note=self.note)
        elif now - self.printed >= self.every:
            self._print()

    def _read(self) -> None:
        if self.unread is not None:
            self.note, self.unread = self.unread(), None

    def _now(self) -> tuple[int, str]:
        self._read()
        return self.done, self.note

    def extend(self, by: int) -> None:
        """There is more to do than was thought."""
        self.total += by
        if self.live is not None:
            self.live.update(self.task, total=self.total)

    def advance(self, note: str | None = None) -> None:
        """One more is done."""
        self.update(self.done + 1, note)

    def seconds_left(self) -> float | None:
        """Estimated from this run's own pace; None before the first step."""
        fresh = self.done - self.first
        if fresh < min(4, self.total):  # the first ones pay for every start
            return None
        return (time.monotonic() - self.started) / fresh * (self.total - self.done)

    def _print(self) -> None:
        self.told = self._now()
        self.printed = time.monotonic()
        left = self.seconds_left()
        time_left = f", {duration(left)} left" if left else ""
        note = f" · {self.note}" if self.note else ""
        self.console.print(f"{self.what}: {self.done}/{self.total}{time_left}{note}", markup=False)


def duration(seconds: float) -> str:
    """`75` → `1 min 15 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
