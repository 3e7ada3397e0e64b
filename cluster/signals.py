"""Clean ends: SIGTERM lets a step finish and saves it, Ctrl-C ends the run, Ctrl-C twice ends it at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from uniapl.runlog import RunError

EARLY_GRACE_S = 60.0
"""Until the configuration has said how long: the default of `run.grace_seconds`."""
SHUTDOWN_S = 10.0
"""Kept of the grace time for ending the run's processes, but never more than half of it."""
KILL_S = 2.0
"""Kept of that for killing what has not ended by then, but never more than a fifth of it."""
ALONE_S = 5.0
"""How long the driver may wait for a run whose processes have all ended."""
POLL_S = 0.2


class Terminated(BaseException):
    """SIGTERM came and nothing is under way any more that could be waited for; the text, if any, says what was lost."""


class Signals:
    """While it is entered, SIGTERM and SIGINT end the run cleanly. For the main thread."""

    def __init__(self) -> None:
        self.bound(EARLY_GRACE_S, lambda: "nothing had begun")
        self._deadline = float("inf")
        self._holding = False
        self._ending = self._finishing = False
        self._family = False
        """Whether the run has processes below this one, as where it started a Ray of its own."""
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._interrupts = 0
        self.asked = False
        """SIGTERM came: write a checkpoint now."""

    def bound(self, grace_s: float, kept: Callable[[], str]) -> None:
        """What is known once the configuration has been read; to be called before anything starts.

        Args:
            grace_s: seconds from SIGTERM to the end of the process; what has not ended by then is killed.
            kept: tells what the run could be resumed from, in words.
        """
        self._grace_s = grace_s
        self._reserve_s = min(SHUTDOWN_S, grace_s / 2)
        self.kept = kept

    def __enter__(self) -> Signals:
        self._before = {number: signal.getsignal(number) for number in self._handlers()}
        self.arm()
        reader, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._told_before = signal.set_wakeup_fd(self._told.fileno())
        threading.Thread(target=self._watch, args=[reader], daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        signal.set_wakeup_fd(self._told_before)
        self._told.close()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:  # by Ray's own handler, while Ray starts
            raise Terminated from error

    def arm(self) -> None:
        """Take the signals; once more after something else took them."""
        for number, handler in self._handlers().items():
            signal.signal(number, handler)

    def _handlers(self) -> dict[signal.Signals, Callable[[int, FrameType | None], None]]:
        return {
            signal.SIGTERM: self._terminate,
            signal.SIGALRM: self._out_of_time,
            signal.SIGINT: self._interrupt,
        }

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around a step and its checkpoint, or imports: SIGTERM waits for their end, as long as its time allows.

        Raises:
            Terminated: SIGTERM came within.
        """
        self._holding = True
        self._family = self._family or bool(descendants(os.getpid()))
        try:
            yield
        except Exception as error:
            if self.asked:
                self._ending, self._error = True, error
            raise
        finally:
            self._holding = False
        if self.asked:
            self._end()

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing is left to do but to end: from now on SIGTERM only bounds how long that may take.

        Args:
            error: what the run ends with.
        """
        self._ending, self._finishing, self._error = True, True, error

    def left(self) -> float:
        """Seconds until what has not ended is killed; without end before SIGTERM."""
        return max(0.0, self._deadline - self._reserve_s * KILL_S / SHUTDOWN_S - time.monotonic())

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            return
        self.asked = True
        self._deadline = time.monotonic() + self._grace_s
        if self._holding:
            signal.setitimer(signal.ITIMER_REAL, self._grace_s - self._reserve_s)
        else:
            self._end()

    def _out_of_time(self, number: int, frame: FrameType | None) -> None:
        self._end()

    def _end(self) -> None:
        if not self._ending:
            self._ending = True
            raise Terminated

    def _watch(self, signals: socket.socket) -> None:
        """In a thread of its own, because Ray's calls may keep the main thread from its handlers: as those do to its
        server, once SIGTERM went to all processes."""
        with signals:
            while signal.SIGTERM not in (numbers := signals.recv(64)):
                if not numbers:  # closed
                    return
            self._deadline = min(self._deadline, time.monotonic() + self._grace_s)
            alone_s = 0.0
            while self.left() > 0 and alone_s < ALONE_S:
                if self._ended.wait(POLL_S):
                    return
                if self._family and not self._finishing and not descendants(os.getpid()):
                    alone_s += POLL_S
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
            own = isinstance(self._error, RunError | OSError)  # and not that of a process that ended too
            told = f"{' '.join(str(self._error).split())[:500]}; " if own else ""
            self._kill(f"{told}ended by SIGTERM, and what had not ended in time was killed", 2 if own else 0)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if self._interrupts == 1:
            raise KeyboardInterrupt
        self._kill("stopped at once", 130)

    def _kill(self, how: str, status: int) -> None:
        kill_descendants(os.getpid())
        os.write(2, f"{how}; {self.kept()}\n".encode())
        os._exit(status)


def kill_descendants(pid: int) -> None:
    """SIGKILL every process below `pid`; for at most 5 s.

    All are stopped first, so that none starts another meanwhile, or starts anew what was killed.
    """
    deadline, found = time.monotonic() + 5, list[int]()
    while (fresh := [p for p in descendants(pid) if p not in found]) and time.monotonic() < deadline:
        _send(fresh, signal.SIGSTOP)
        found += fresh
    _send(found, signal.SIGKILL)


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:  # it ended by itself
            continue


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, parents first, without those that have ended."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [pid]
    for parent_pid in found:
        found += children.get(parent_pid, [])
    return found[1:]
