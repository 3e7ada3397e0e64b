"""Calling code that may hang: daemon threads, a time limit per call, a bound on abandoned threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class _Call:
    function: Callable[[], Any]
    started: float | None = None
    finished: bool = False
    abandoned: bool = False
    outcome: Any = None


class CallPool:
    """Runs calls on `threads` daemon threads, each call within its own time limit.

    Python cannot stop a thread. One that outlives its limit is abandoned and replaced by a new one,
    up to `max_stuck` at a time; with more than that the pool is no longer `healthy` and its owner
    should be replaced. Calls that find no thread left fail at once: nothing waits without a bound.
    """

    def __init__(self, threads: int = 8, max_stuck: int = 8) -> None:
        self._threads, self._max_stuck = threads, max_stuck
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._live = self._stuck = self._timeouts = 0
        for _ in range(threads):
            self._start_thread()

    @property
    def healthy(self) -> bool:
        return self._stuck <= self._max_stuck

    def stats(self) -> dict[str, int]:
        """Threads that are stuck now, and calls that ever timed out."""
        return {"stuck_threads": self._stuck, "timeouts": self._timeouts}

    def run(self, functions: Sequence[Callable[[], Any]], timeout_s: float) -> list[Any]:
        """What each function returned, or the exception that it raised, in their order.

        A call that takes longer than `timeout_s` seconds from its own start gives a `TimeoutError`.
        """
        calls = [_Call(function) for function in functions]
        for call in calls:
            self._calls.put(call)
        with self._changed:
            for call in calls:
                self._wait(call, timeout_s)
        return [call.outcome for call in calls]

    def _wait(self, call: _Call, timeout_s: float) -> None:
        while not call.finished:
            if call.started is not None:
                left = call.started + timeout_s - time.monotonic()
                if left <= 0:
                    self._abandon(call, timeout_s)
                else:
                    self._changed.wait(left)
            elif self._live == 0:
                call.finished, call.outcome = True, TimeoutError("every thread is stuck in an earlier call")
            else:
                self._changed.wait(timeout_s)

    def _abandon(self, call: _Call, timeout_s: float) -> None:
        call.finished = call.abandoned = True
        call.outcome = TimeoutError(f"took longer than {timeout_s:g} s")
        self._stuck, self._timeouts, self._live = self._stuck + 1, self._timeouts + 1, self._live - 1
        if self.healthy:
            self._start_thread()
        self._changed.notify_all()

    def _start_thread(self) -> None:
        self._live += 1
        threading.Thread(target=self._work, name="reward", daemon=True).start()

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            with self._changed:
                if call.finished:
                    continue
                call.started = time.monotonic()
                self._changed.notify_all()
            try:
                outcome = call.function()
            except BaseException as error:  # a reward may even raise SystemExit; it is the call's outcome
                outcome = error
            if not self._finish(call, outcome):
                return

    def _finish(self, call: _Call, outcome: Any) -> bool:
        """Record an outcome; whether this thread goes on working."""
        with self._changed:
            self._changed.notify_all()
            if not call.abandoned:
                call.finished, call.outcome = True, outcome
                return True
            self._stuck -= 1
            if self._live >= self._threads:
                return False
            self._live += 1
            return True
