"""How the learner talks to the rollout engines during a weight broadcast: every call has a deadline."""

from __future__ import annotations

from typing import Any

import ray

from uniapl.transfer import TransferError


class EngineClient:
    """vLLM's weight-sync client protocol over rollout actors.

    Args:
        handles: the actors.
        engine_ranks: workers behind each of them (tensor parallel).
        timeout_s: for every call.
    """

    def __init__(self, handles: list[Any], engine_ranks: int, timeout_s: float) -> None:
        self._handles = handles
        self._engine_ranks = engine_ranks
        self._timeout_s = timeout_s
        self._acknowledged: list[tuple[int, str]] = []
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Give every engine ranks of its own in the group, after the learner's."""
        first = init_info["rank_offset"]
        calls = [
            handle.init_weight_transfer_engine.remote(init_info | {"rank_offset": first + i * self._engine_ranks})
            for i, handle in enumerate(self._handles)
        ]
        self._gather(calls, "join the weight group")

    def start_weight_update(self) -> None:
        self._gather([h.start_weight_update.remote() for h in self._handles], "pause for new weights")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._gather([h.update_weights.remote(update_info) for h in self._handles], "receive weights")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        calls = [h.finish_weight_update.remote(self.version) for h in self._handles]
        self._acknowledged = self._gather(calls, "load the weights received")

    def check(self, version: int, digest: str) -> None:
        """Compare what the engines acknowledged with what was sent.

        Raises:
            TransferError: another version or other bytes.
        """
        for number, (got_version, got_digest) in enumerate(self._acknowledged):
            if (got_version, got_digest) != (version, digest):
                raise TransferError(
                    f"rollout actor {number} acknowledged version {got_version} with checksum {got_digest or '-'}; "
                    f"sent was version {version} with {digest or '-'}"
                )

    def _gather(self, calls: list[Any], phase: str) -> list[Any]:
        done, late = ray.wait(calls, num_returns=len(calls), timeout=self._timeout_s)
        answers = ray.get(done)
        if late:
            who = ", ".join(str(calls.index(call)) for call in late)
            raise TransferError(f"rollout actor {who} did not {phase} within {self._timeout_s:g} s")
        return answers
