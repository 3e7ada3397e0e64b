"""Clean ends: what a signal does while a step is under way, and when nothing is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.signals import Signals, Terminated, descendants, kill_descendants


def signals_with(grace_s: float) -> Signals:
    signals = Signals()
    signals.bound(grace_s, lambda: "nothing is kept")
    return signals


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_lets_a_step_finish_and_ends_after_it() -> None:
    done = []
    with signals_with(60) as signals, pytest.raises(Terminated), signals.held():
        assert not signals.asked
        terminate()
        terminate()
        assert signals.asked
        done.append("checkpoint")
    assert done == ["checkpoint"]


def test_sigterm_ends_at_once_what_is_no_step() -> None:
    with signals_with(60), pytest.raises(Terminated):
        terminate()


def test_a_step_longer_than_the_grace_time_is_left() -> None:
    began = time.monotonic()
    with signals_with(0.4) as signals, pytest.raises(Terminated), signals.held():
        terminate()
        time.sleep(5)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("signal_before", [lambda: None, terminate], ids=["alone", "after SIGTERM"])
def test_an_error_stays_that_error(signal_before: Callable[[], None]) -> None:
    with signals_with(60) as signals, pytest.raises(RuntimeError, match="disk full"), signals.held():
        signal_before()
        raise RuntimeError("disk full")


def test_after_an_error_a_run_that_goes_on_is_ended_as_before() -> None:
    with signals_with(60) as signals, pytest.raises(Terminated):
        with pytest.raises(RuntimeError), signals.held():
            raise RuntimeError("a part was lost")
        terminate()


def test_sigterm_does_not_break_off_what_a_run_does_at_its_end() -> None:
    with signals_with(60) as signals:
        signals.finish()
        terminate()
        assert signals.left() <= 58, "but it is bounded"


def test_sigterm_while_ray_has_it_is_the_same_end() -> None:
    with pytest.raises(Terminated), signals_with(60):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as `ray.init` does
        terminate()


def test_what_is_left_for_the_end_follows_from_the_grace_time() -> None:
    with signals_with(60) as signals, pytest.raises(Terminated), signals.held():
        assert signals.left() == float("inf")
        terminate()
        assert 57 < signals.left() <= 58


SLOW = """
import ctypes, os, signal, subprocess, sys, threading, time
from cluster.signals import Signals, Terminated

def stuck():  # as a call into Ray may be: no handler of Python's is run
    lock = ctypes.create_string_buffer(64)
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(lock)

how = sys.argv[1]
signals = Signals()
signals.bound(60 if how == "alone" else 1, lambda: "step-00003 is kept")
with signals:
    child = subprocess.Popen(["sleep", "60"])
    try:
        with signals.held():
            threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
            if how == "alone":
                child.kill()
                child.wait()
            if how in ("alone", "stuck"):
                stuck()
            time.sleep(0.4)
            if how == "error":
                raise OSError("disk full")
    except (Terminated, OSError):
        time.sleep(60)
"""


@pytest.mark.parametrize("how", ["step", "error", "stuck", "alone"])
def test_what_has_not_ended_within_the_grace_time_is_killed(how: str) -> None:
    """Or at once, where the main thread waits for processes of the run that are gone."""
    began = time.monotonic()
    process = started(SLOW, how)
    output, _ = process.communicate(timeout=30)
    told = "disk full; " if how == "error" else ""
    assert output == f"{told}ended by SIGTERM, and what had not ended in time was killed; step-00003 is kept\n"
    assert process.returncode == (2 if told else 0)
    assert time.monotonic() - began < 10
    assert_gone(process.pid)


def test_afterwards_signals_mean_what_they_meant() -> None:
    numbers = (signal.SIGTERM, signal.SIGALRM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with signals_with(60) as signals:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray takes it
        signals.arm()
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


SECOND = """
import os, signal, subprocess, time
from cluster.signals import Signals
with Signals():
    try:
        subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60"])
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        print("unwinding", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
"""


def test_a_second_ctrl_c_ends_at_once_with_everything_below() -> None:
    process = started(SECOND)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output == "unwinding\nstopped at once; nothing had begun\n"
    assert_gone(process.pid)


def test_processes_below_are_found_parents_first_and_killed() -> None:
    parent = subprocess.Popen(["sh", "-c", "sh -c 'sleep 60 & wait' & wait"])
    deadline = time.monotonic() + 10
    while len(descendants(parent.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(descendants(parent.pid)) == 2
    kill_descendants(parent.pid)
    parent.wait(timeout=10)
    assert descendants(parent.pid) == []


def started(program: str, *arguments: str) -> subprocess.Popen[str]:
    """A program in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=Path(__file__).resolve().parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def assert_gone(leader: int) -> None:
    """No process of `leader`'s session; what was killed is gone when the kernel comes to it."""
    deadline = time.monotonic() + 10
    while left := [pid for pid in descendants(1) if _session(pid) == leader]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0
