"""Rounds of the strictly synchronous mode: who makes which group does not depend on who asks first."""

from __future__ import annotations

from collections.abc import Sequence

from uniapl.leases import Lease
from uniapl.mixing import MixingQueue


def lease_round(queue: MixingQueue, actors: Sequence[str], now: float) -> dict[str, list[Lease]]:
    """Lease at once all that admission allows: the i-th prompt by sequence to `actors[i % len(actors)]`.

    Args:
        queue: whose prompts are leased.
        actors: that take part, in a fixed order.
        now: seconds on the queue's clock.

    Returns:
        leases by actor; empty while a lease of the round before is open, or admission forbids.
    """
    queue.expire(now)
    if not actors or queue.open:
        return {}
    shares: dict[str, list[Lease]] = {}
    for i in range(queue.admissible):
        actor = actors[i % len(actors)]
        if (lease := queue.lease(actor, now)) is not None:
            shares.setdefault(actor, []).append(lease)
    return shares
