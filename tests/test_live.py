"""The live table: what a terminal shows, what a log file shows, and that the cursor comes back."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from uniapl.live import LiveTable, duration

STEP = {
    "reward/mean": 0.3125,
    "reward/pass_rate": 0.25,
    "loss/total": 1.5,
    "loss/preference": -0.01,
    "loss/demonstration": 1.25,
    "loss/adversarial": 0.02,
    "share/preference": 0.1,
    "share/demonstration": 0.7,
    "share/adversarial": 0.15,
    "share/kl": 0.05,
    "discriminator/gap": 0.41,
    "discriminator/accuracy": 0.75,
    "kl/reference": 0.0125,
    "entropy/estimate": 1.0625,
    "staleness/mean": 1.0,
    "queue/ready": 8,
    "queue/open": 3,
    "tokens/generated_per_s": 830.2,
    "tokens/trained_per_s": 1234.5,
    "time/generate": 2.5,
    "time/score": 0.25,
    "time/train": 5.0,
    "time/broadcast": 0.25,
    "time/step": 8.0,
}


def plain(*calls, total=30):
    """The lines that a log file gets."""
    out = io.StringIO()
    with LiveTable(total, Console(file=out)) as live:
        for name, *args in calls:
            getattr(live, name)(*args)
    return out.getvalue().splitlines()


def rendered(*steps, width=140, total=30):
    """The table as text, as a terminal of that width would show it."""
    live = LiveTable(total, Console(file=io.StringIO()))
    for number, metrics in steps:
        live.step(number, metrics)
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(live)
    return capture.get()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (8.26, "8.3 s"), (60, "1:00"), (125, "2:05"), (3725, "1:02:05")]
)
def test_durations_read_as_clocks(seconds, text):
    assert duration(seconds) == text


def test_a_log_file_gets_one_plain_line_per_phase_note_and_step():
    lines = plain(("phase", "starting engine"), ("note", "engine ready"), ("step", 3, STEP))
    assert len(lines) == 3
    assert all(re.match(r"\[\d+\.\d s\] ", line) for line in lines)
    assert lines[0].endswith("starting engine ...") and lines[1].endswith("engine ready")
    for part in [
        "step 3/30",
        "reward 0.312",
        "pass 25%",
        "loss 1.500",
        "queue 8/3",
        "disc acc 75%",
        "kl 0.013",
        "entropy 1.062",
        "gen tok/s 830",
        "train 5.0",
        "3:36 left",
    ]:
        assert part in lines[2]
    assert "\x1b" not in "".join(lines)


def test_metrics_that_a_method_lacks_are_left_out():
    [line] = plain(("step", 30, {"loss/total": 2.0, "loss/demonstration": 2.0}))
    assert "reward" not in line and "queue" not in line and "left" not in line
    assert "demo 2.000" in line


def test_text_cannot_send_control_codes_or_break_the_line():
    lines = plain(("note", "a\x1b[2Jb\nc"), ("phase", "[bold]x[/bold]"))
    assert len(lines) == 2
    assert "\x1b" not in lines[0] and lines[1].endswith("[bold]x[/bold] ...")


def test_phases_show_how_long_they_take_and_took():
    live = LiveTable(30, Console(file=io.StringIO()))
    live.phase("starting engine")
    live.phase("evaluating")
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(live)
    assert re.search(r"starting engine: 0\.\d s\nevaluating \.\.\. 0\.\d s\n", capture.get())


def test_the_table_shows_step_time_left_and_where_the_time_went():
    shown = rendered((11, STEP), (12, STEP))
    assert "step 12/30" in shown and "2:24 left" in shown
    for title in ["reward", "pref", "demo", "adv", "expert gap", "stale", "queue", "gen tok/s", "train tok/s"]:
        assert title in shown
    assert "generate 31%" in shown and "train 62%" in shown
    assert "preference 10%" in shown and "demonstration 70%" in shown and "kl 5%" in shown


def test_bars_are_in_proportion_and_fill_the_width():
    progress, times = (line for line in rendered((15, {"time/train": 3})).splitlines() if "█" in line)
    assert (progress.count("█"), times.count("█")) == (68, 136)


@pytest.mark.parametrize("width", [24, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    shown = rendered(*[(n, STEP) for n in range(1, 15)], width=width)
    assert max(len(line) for line in shown.splitlines()) <= width


def test_narrow_terminals_keep_the_reward_and_lose_the_details():
    shown = rendered((1, STEP), width=40)
    assert "reward" in shown and "train tok/s" not in shown


def test_only_the_latest_steps_stay_in_sight():
    assert rendered(*[(n, STEP) for n in range(1, 1001)], total=1000).count("\n") < 20


def test_a_terminal_without_unicode_gets_ascii_only():
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    live = LiveTable(30, Console(file=io.StringIO()))
    live.step(1, STEP)
    Console(width=100, file=shown, force_terminal=True, color_system=None, legacy_windows=False).print(live)
    shown.flush()
    assert b"####" in shown.buffer.getvalue()


PROGRAM = """
import time
from rich.console import Console
from uniapl.live import LiveTable
with LiveTable(5) as live:
    live.phase("starting engine")
    live.step(1, {"reward/mean": 0.5, "time/step": 1.0})
    live.note("ready")
    while True:  # one long sleep would not notice a signal that comes just before it begins
        time.sleep(0.05)
"""


def test_on_a_terminal_ctrl_c_brings_the_cursor_back():
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        stdin=theirs,
        env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    )
    os.close(theirs)
    shown = _read_until(ours, b"ready")
    program.send_signal(signal.SIGINT)
    shown += _read_until(ours, b"\x1b[?25h")
    assert program.wait(20) != 0
    os.close(ours)
    assert b"\x1b[?25l" in shown and b"step 1/5" in shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


def _read_until(terminal, wanted, seconds=20):
    seen, end = b"", time.monotonic() + seconds
    while wanted not in seen:
        assert time.monotonic() < end, seen
        seen += os.read(terminal, 4096)
    return seen
