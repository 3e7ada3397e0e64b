"""The live table on a terminal: resized, without colours, without being a terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress

import pyte
import pytest
from rich.console import Console
from test_live import STEP

from uniapl.live import LiveTable

PROGRAM = """
import sys, time
from uniapl.live import LiveTable
from test_live import STEP
with LiveTable(9) as live:
    live.phase("starting engine")
    for step in range(1, 4):
        live.step(step, STEP)
        live.note(f"note {step}")
    sys.stdin.readline()
    live.note("the end")
"""
COLOUR = re.compile(r"\x1b\[[\d;]*(?:3[0-7]|9[0-7])[\d;]*m")


class Reflowing(pyte.Screen):
    """A terminal that breaks its lines anew when it gets narrower, as most do; pyte's own one cuts them."""

    def narrow(self, columns: int) -> None:
        lines = [line.rstrip() for line in self.display[: self.cursor.y + 1]]
        broken = [line[at : at + columns] for line in lines for at in range(0, max(1, len(line)), columns)]
        self.resize(self.lines, columns)
        self.erase_in_display(2)
        for row, text in enumerate(broken[-self.lines :], start=1):
            self.cursor_position(row, 1)
            self.draw(text)


def set_size(terminal: int, lines: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


def read_for(terminal: int, stream: pyte.ByteStream, seconds: float) -> None:
    end = time.monotonic() + seconds
    with suppress(OSError):  # the program has ended
        while (left := end - time.monotonic()) > 0:
            if select.select([terminal], [], [], left)[0]:
                stream.feed(os.read(terminal, 65536))


def shown(screen: pyte.Screen) -> str:
    return "\n".join(line.rstrip() for line in screen.display)


def test_a_resized_terminal_shows_one_whole_table_and_its_notes() -> None:
    ours, theirs = pty.openpty()
    set_size(ours, 40, 140)
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    env |= {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    screen = Reflowing(140, 40)
    stream = pyte.ByteStream(screen)
    deadline = time.monotonic() + 30
    while "note 3" not in shown(screen):
        assert time.monotonic() < deadline, shown(screen)
        read_for(ours, stream, 0.2)
    assert "train tok/s" in shown(screen)
    for columns in (60, 100, 45):
        if columns < screen.columns:
            screen.narrow(columns)
        else:
            screen.resize(40, columns)
        set_size(ours, 40, columns)
        read_for(ours, stream, 0.7)
        text = shown(screen)
        assert [text.count(part) for part in ("─ UniAPL ─", "step 3/9", "note 1", "note 3")] == [1, 1, 1, 1], text
        assert text.count("╭") == text.count("╯") == 1, text
        edges = {len(line) for line in text.splitlines() if line[:1] in "╭│╰" and line}
        assert edges == {columns}, text
    os.write(ours, b"\n")
    read_for(ours, stream, 0.7)
    assert program.wait(20) == 0 and "the end" in shown(screen) and not screen.cursor.hidden
    os.close(ours)


def rendered(environment: dict[str, str]) -> str:
    live = LiveTable(30, Console(file=io.StringIO()))
    live.phase("training")
    live.step(11, STEP)
    console = Console(width=140, file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"} | environment)
    with console.capture() as capture:
        console.print(live)
    return capture.get()


def test_colours_are_those_of_the_bars_and_their_legends_alone() -> None:
    coloured = [line for line in rendered({}).splitlines() if COLOUR.search(line)]
    assert coloured
    for line in coloured:
        plain = re.sub(r"\x1b\[[\d;]*m", "", line)
        assert set(plain) <= set("│ █") or "time: " in plain or "loss shares: " in plain, plain
    assert not COLOUR.search(rendered({"NO_COLOR": "1"}))


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(environment: dict[str, str]) -> None:
    out = io.StringIO()
    with LiveTable(30, Console(file=out, force_terminal=True, _environ=environment)) as live:
        live.step(1, STEP)
        live.note("ready")
    assert len(out.getvalue().splitlines()) == 2 and "\x1b" not in out.getvalue()


def test_the_time_left_follows_the_latest_steps() -> None:
    out = io.StringIO()
    with LiveTable(50, Console(file=out)) as live:
        for step in range(1, 41):
            live.step(step, {"time/step": 30.0 if step <= 30 else 3.0})
    assert out.getvalue().splitlines()[-1].endswith("  30.0 s left")
