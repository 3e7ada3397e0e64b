"""A wall clock that was set back, and what Ray (2.60) then does not notice.

Its timers wait for a time of day: those that were set before wait for as long as the clock was set back, in raylets, in
the GCS and in every process that is connected to them. Ray Serve asks for a replica's health by the wall clock, too.
Nothing of a run's own follows it (`tests/test_floors.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ray._private.state import actors

from actors.reward_service import replica_class, restart_controller

LOOK_S = 2.0
GONE_S = 15.0
"""Serve itself has a new replica under way sooner than that."""
SET_BACK_S = 10.0
"""Less than that delays Ray's timers by less than its own limits."""


class WallClock:
    """Tells where it was set back.

    Args:
        note: called with a line for the user.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._offset = _offset()

    def look(self) -> None:
        """To be called at every step."""
        before, self._offset = self._offset, _offset()
        if (back := before - self._offset) > SET_BACK_S:
            line = "timers of Ray's stand still, and a node or reward replica that is lost may not be missed"
            self._note(f"the wall clock was set back by {back:.0f} s: for as long, {line}")


def _offset() -> float:
    """Of the wall clock, from the monotonic one, in seconds."""
    return time.time() - time.monotonic()


class RewardWatch:
    """Replaces reward replicas that are gone and that Serve does not miss.

    Its controller looks for all of them when it starts anew. Who called it before learns of new replicas by a timer of
    Ray's, but one that is new to it asks at once.

    Args:
        replicas: that are always there.
        note: called with a line for the user.
        renew: gives all callers new handles.
    """

    def __init__(self, replicas: int, note: Callable[[str], None], renew: Callable[[], None]) -> None:
        self._replicas = replicas
        self._note = note
        self._renew = renew
        self._looked = time.monotonic()
        self._missing: float | None = None
        """Since when."""
        self._anew = False
        """The controller, since when replicas were there last."""

    def look(self) -> None:
        """To be called again and again; asks Ray at most every LOOK_S seconds."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        if _there() >= self._replicas:
            if self._anew:
                self._renew()
            self._missing, self._anew = None, False
        elif self._missing is None:
            self._missing = now
        elif now - self._missing > GONE_S:
            self._note(f"Ray Serve has missed for {GONE_S:g} s that a reward replica died: its controller starts anew")
            restart_controller()
            self._missing, self._anew = None, True


def _there() -> int:
    """Replicas that run or are being started."""
    replica = replica_class()
    return sum(replica in actor["ActorClassName"] and actor["State"] != "DEAD" for actor in actors().values())
