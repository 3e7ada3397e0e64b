"""What the user sees of a long walk: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 256
"""Rows between two updates."""


class Bar:
    """A progress bar on standard error; use it as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rows]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def stage(self, title: str, total: int | None) -> None:
        """Begin anew; `total` in the unit of `at`, None: not known."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(title, total=total, rows="")

    def at(self, done: int, rows: int | None = None) -> None:
        """So much is done; in `rows` rows, where they are counted."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, rows="" if rows is None else f"{rows:,} rows")

    def say(self, line: str) -> None:
        """A line that stays."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
