"""Reward replicas that are gone and that Ray Serve does not miss.

Serve asks for a replica's health by the wall clock (Ray 2.60): where that was set back by an hour it asks again in an
hour, and until then does not learn of a replica's death. Its controller looks at once when it starts anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ray._private.state import actors

from actors.reward_service import replica_class, restart_controller

LOOK_S = 2.0
GONE_S = 15.0
"""Serve itself has a new replica under way sooner than that."""


class RewardWatch:
    """Has Serve's controller start anew where replicas have been missing for a while.

    Args:
        replicas: that are always there.
        note: called with a line for the user.
    """

    def __init__(self, replicas: int, note: Callable[[str], None]) -> None:
        self._replicas = replicas
        self._note = note
        self._looked = time.monotonic()
        self._missing: float | None = None
        """Since when."""

    def look(self) -> None:
        """To be called again and again; asks Ray at most every LOOK_S seconds."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        if _there() >= self._replicas:
            self._missing = None
        elif self._missing is None:
            self._missing = now
        elif now - self._missing > GONE_S:
            self._note(f"Ray Serve has missed for {GONE_S:g} s that a reward replica died: its controller starts anew")
            restart_controller()
            self._missing = None


def _there() -> int:
    """Replicas that run or are being started."""
    replica = replica_class()
    return sum(replica in actor["ActorClassName"] and actor["State"] != "DEAD" for actor in actors().values())
