"""What the user sees while a run goes on: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, Self

from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

Metrics = dict[str, float]

ROWS = 8
"""Steps that stay in sight."""
NOTES = 20
"""Latest notes, which are shown again when the terminal has another size."""
ETA_STEPS = 10
"""Latest steps whose mean duration the remaining time is judged by."""


class Column(NamedTuple):
    """A column of the table; where the terminal is narrow, columns of high `rank` are left out first."""

    title: str
    keys: tuple[str, ...]
    show: Callable[[float], str]
    rank: int


def duration(seconds: float) -> str:
    """Such as `8.3 s`, `2:05` or `1:02:05`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _tenths(value: float) -> str:
    return f"{value:.1f}"


COLUMNS = [
    Column("reward", ("reward/mean",), _number, 0),
    Column("pass", ("reward/pass_rate",), _percent, 1),
    Column("loss", ("loss/total",), _number, 2),
    Column("pref", ("loss/preference",), _number, 4),
    Column("demo", ("loss/demonstration",), _number, 5),
    Column("adv", ("loss/adversarial",), _number, 6),
    Column("expert gap", ("discriminator/gap",), _number, 7),
    Column("disc acc", ("discriminator/accuracy",), _percent, 8),
    Column("stale", ("staleness/mean",), _tenths, 9),
    Column("kl", ("kl/reference",), _number, 6),
    Column("entropy", ("entropy/estimate",), _number, 11),
    Column("queue", ("queue/ready", "queue/open"), _count, 10),
    Column("engines", ("fleet/members",), _count, 12),
    Column("gen tok/s", ("tokens/generated_per_s",), _count, 8),
    Column("train tok/s", ("tokens/trained_per_s",), _count, 8),
    Column("time", ("time/step",), duration, 3),
]
TIMES = [
    ("generate", "time/generate", "blue"),
    ("score", "time/score", "magenta"),
    ("wait", "time/wait", "bright_black"),
    ("train", "time/train", "green"),
    ("evaluate", "time/evaluate", "cyan"),
    ("broadcast", "time/broadcast", "yellow"),
    ("other", "time/other", "white"),
]
SHARES = [
    ("preference", "share/preference", "blue"),
    ("demonstration", "share/demonstration", "yellow"),
    ("adversarial", "share/adversarial", "magenta"),
    ("kl", "share/kl", "cyan"),
]


class _Resizable(Live):
    """Draws on a cleared screen when the terminal has another size.

    Many terminals break the lines that stand there anew when they get narrower; rich would then go up too few of them
    and leave pieces of the old table behind. Every refresh looks at the size, so no signal is needed.
    """

    def __init__(self, table: LiveTable, console: Console) -> None:
        super().__init__(get_renderable=lambda: table, console=console, refresh_per_second=4)
        self._table = table
        self._size = console.size

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        size, self._size = self._size, self.console.size
        if size != self._size and self.console.is_interactive:
            notes = [Text(note + "\n") for note in self._table.notes]
            renderables = [Control.home(), Control.clear(), *notes, *renderables]
        return super().process_renderables(renderables)


class LiveTable:
    """Shows phases, notes and steps of a run; leave it (also by an exception) to restore the terminal.

    `total_steps`: optimizer steps of the whole run, resumed ones included. Where `console` is no
    terminal, every phase, note and step is one plain line.
    """

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self._total = total_steps
        self._console = console or Console()
        self._plain = not self._console.is_interactive
        self._start = self._phase_start = self._last_step_at = time.monotonic()
        self._phase: str | None = None
        self._done_phases: list[tuple[str, float]] = []
        self._steps: list[tuple[int, Metrics]] = []
        self._durations: list[float] = []
        self._elapsed: float | None = None
        self.notes: list[str] = []
        """The latest ones, printable."""
        self._live = _Resizable(self, self._console)

    def __enter__(self) -> Self:
        self._start = self._last_step_at = time.monotonic()
        if not self._plain:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_phase()
        if not self._plain:
            self._live.stop()

    def phase(self, name: str) -> None:
        """What goes on from now until the next phase or step, such as `starting engine`."""
        self._end_phase()
        self._phase, self._phase_start = name, time.monotonic()
        self._line(f"{name} ...")

    def note(self, text: str) -> None:
        """One line that stays in sight above the table."""
        if self._plain:
            self._line(text)
        else:
            self._console.print(Text(_printable(text)))
            self.notes = [*self.notes, _printable(text)][-NOTES:]

    def step(self, step: int, metrics: Metrics, elapsed_s: float | None = None) -> None:
        """Show the metrics of a finished optimizer step; `step` counts from 1.

        `elapsed_s`: how long the run has gone on, where that is not since the table was entered.
        """
        self._elapsed = elapsed_s
        self._end_phase()
        now = time.monotonic()
        self._durations.append(metrics.get("time/step", now - self._last_step_at))
        self._last_step_at = now
        self._steps = [*self._steps, (step, dict(metrics))][-ROWS:]
        self._line(_plain_step(step, self._total, metrics, self._remaining()))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, block = options.max_width, "#" if options.ascii_only else "█"
        yield from (Text(f"{name}: {duration(took)}", style="dim") for name, took in self._done_phases[-4:])
        if self._phase is not None:
            yield Text(f"{self._phase} ... {duration(time.monotonic() - self._phase_start)}", style="bold")
        if self._steps:
            yield Panel(Group(*self._body(width - 4, block)), title="UniAPL", title_align="left", width=width)

    def _body(self, width: int, block: str) -> Iterator[RenderableType]:
        step, latest = self._steps[-1]
        yield self._head(step)
        done = min(width, round(step / self._total * width))
        yield Text.assemble(block * done, ("." * (width - done), "dim"))
        yield _table(self._steps, width)
        for title, parts in (("time", TIMES), ("loss shares", SHARES)):
            bar = _stacked_bar(title, [(name, latest.get(key), style) for name, key, style in parts], width, block)
            if bar is not None:
                yield bar

    def _head(self, step: int) -> Text:
        remaining = self._remaining()
        left = "" if remaining is None else f"   {duration(remaining)} left"
        return Text(f"step {step}/{self._total}   {duration(self._age())}{left}", style="bold")

    def _age(self) -> float:
        return time.monotonic() - self._start if self._elapsed is None else self._elapsed

    def _remaining(self) -> float | None:
        """Seconds to the last step, judged by the latest ones."""
        if not self._steps:
            return None
        recent = self._durations[-ETA_STEPS:]
        return max(0, self._total - self._steps[-1][0]) * sum(recent) / len(recent)

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._done_phases.append((self._phase, time.monotonic() - self._phase_start))
            self._phase = None

    def _line(self, text: str) -> None:
        if self._plain:
            stamp = duration(self._age())
            print(f"[{stamp}] {_printable(text)}", file=self._console.file, flush=True)


def _value(column: Column, metrics: Metrics) -> str:
    return "/".join(column.show(metrics[key]) if key in metrics else "-" for key in column.keys)


def _present(column: Column, steps: list[tuple[int, Metrics]]) -> bool:
    return any(key in metrics for _, metrics in steps for key in column.keys)


def _table(steps: list[tuple[int, Metrics]], width: int) -> Table:
    """The latest steps, with as many columns as `width` characters hold."""
    shown = [column for column in COLUMNS if _present(column, steps)]
    widths = {c: max(len(c.title), *(len(_value(c, m)) for _, m in steps)) + 2 for c in shown}
    while shown and sum(widths[c] for c in shown) + 8 > width:
        shown.remove(max(shown, key=lambda c: c.rank))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("step", *(column.title for column in shown)):
        table.add_column(title, justify="right", no_wrap=True)
    for number, metrics in steps:
        style = "bold" if number == steps[-1][0] else ""
        table.add_row(str(number), *(_value(column, metrics) for column in shown), style=style)
    return table


def _stacked_bar(title: str, parts: list[tuple[str, float | None, str]], width: int, block: str) -> Text | None:
    """One line of blocks in proportion to the parts, and a legend; None when there is nothing to show."""
    known = [(name, value, style) for name, value, style in parts if value is not None and value > 0]
    total = sum(value for _, value, _ in known)
    if total <= 0:
        return None
    text, drawn, reached = Text(), 0, 0.0
    for _, value, style in known:
        reached += value
        cells = round(reached / total * width) - drawn
        drawn += cells
        text.append(block * cells, style=style)
    text.append(f"\n{title}: ", style="dim")
    for index, (name, value, style) in enumerate(known):
        text.append(("  " if index else "") + f"{name} {value / total:.0%}", style=style)
    return text


def _plain_step(step: int, total: int, metrics: Metrics, remaining: float | None) -> str:
    parts = [f"step {step}/{total}"]
    parts += [f"{column.title} {_value(column, metrics)}" for column in COLUMNS if _present(column, [(step, metrics)])]
    seconds = [f"{name} {metrics[key]:.1f}" for name, key, _ in TIMES if key in metrics]
    if seconds:
        parts.append(f"({' '.join(seconds)} s)")
    if remaining is not None and step < total:
        parts.append(f"{duration(remaining)} left")
    return "  ".join(parts)


def _printable(text: str) -> str:
    """On one line, without control characters that a terminal would obey."""
    return "".join(char if char.isprintable() else " " for char in text)
