"""Clean ends: what a signal does while a step is under way, and when nothing is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.signals import Signals, Terminated, descendants, kill_descendants


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_lets_a_step_finish_and_ends_after_it() -> None:
    done = []
    with Signals(60) as signals, pytest.raises(Terminated), signals.step():
        assert not signals.asked
        terminate()
        terminate()
        assert signals.asked
        done.append("checkpoint")
    assert done == ["checkpoint"]


def test_sigterm_ends_at_once_what_is_no_step() -> None:
    with Signals(60), pytest.raises(Terminated):
        terminate()


def test_a_step_longer_than_the_grace_time_is_left() -> None:
    began = time.monotonic()
    with Signals(0.4) as signals, pytest.raises(Terminated), signals.step():
        terminate()
        time.sleep(5)
    assert time.monotonic() - began < 2


def test_an_error_after_sigterm_is_that_end_and_an_error_without_it_stays_one() -> None:
    with Signals(60) as signals, pytest.raises(Terminated), signals.step():
        terminate()
        raise RuntimeError("a rank got the signal too")
    with Signals(60) as signals, pytest.raises(RuntimeError, match="its own fault"), signals.step():
        raise RuntimeError("its own fault")


def test_afterwards_signals_mean_what_they_meant() -> None:
    numbers = (signal.SIGTERM, signal.SIGALRM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with Signals(60) as signals:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray takes it
        signals.arm()
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


SECOND = """
import os, signal, subprocess, time
from cluster.signals import Signals
with Signals(60):
    try:
        subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60"])
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        print("unwinding", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
"""


def test_a_second_ctrl_c_ends_at_once_with_everything_below() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SECOND],
        cwd=Path(__file__).resolve().parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output == "unwinding\nstopped at once; `--resume` goes on from the newest checkpoint\n"
    deadline = time.monotonic() + 10  # what was killed is gone when the kernel comes to it
    while left := [pid for pid in descendants(1) if _session(pid) == process.pid]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_processes_below_are_found_parents_first_and_killed() -> None:
    parent = subprocess.Popen(["sh", "-c", "sh -c 'sleep 60 & wait' & wait"])
    deadline = time.monotonic() + 10
    while len(descendants(parent.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(descendants(parent.pid)) == 2
    kill_descendants(parent.pid)
    parent.wait(timeout=10)
    assert descendants(parent.pid) == []


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0
