"""What a weight broadcast came to. Without torch, so that the driver can hold it."""

from __future__ import annotations

from dataclasses import dataclass, field


class BroadcastError(TimeoutError):
    """The learner itself missed a deadline of a broadcast: no engine is at fault, and none is cut off."""


@dataclass(frozen=True)
class Sent:
    """A broadcast, or the forming of its group, that is over; the learner goes on in any case."""

    metrics: dict[str, float]
    """`broadcast/bytes`, and the seconds of every phase: `broadcast/join_s`, `pause_s`, `gather_s`, `send_s`,
    `load_s`, `resume_s`; all of them of every attempt, and of the forming of the group before. Of the forming
    itself: nothing."""

    lost: dict[int, str] = field(default_factory=dict)
    """Engines cut off since `connect` or in this broadcast: place among the handles last given to `connect`, why."""
