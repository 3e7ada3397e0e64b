"""How the learner talks to the rollout engines during a weight broadcast: every phase has a deadline.

An engine that dies, misses the deadline or fails is cut off. In the two phases in which all of them and the learner
wait for one another (join, receive) the others are let go at once, by closing the group under them, and say that they
were interrupted: that is not their fault.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from uniapl.broadcast_result import BroadcastError
from uniapl.transfer import TransferError

GRACE_S = 10.0
"""At most so long, or half a deadline, may an engine take to say that it was interrupted, once it has been let go."""


class EnginesLostError(TransferError):
    """Engines were cut off in the middle of an attempt: it must be made again, without them."""


class EngineClient:
    """vLLM's weight-sync client protocol over rollout actors.

    Args:
        handles: the actors.
        engine_ranks: workers behind each of them (tensor parallel).
        timeout_s: for every phase.
    """

    def __init__(self, handles: list[Any], engine_ranks: int, timeout_s: float) -> None:
        self.members: dict[int, Any] = dict(enumerate(handles))
        """The engines that are not cut off, by their place among the handles."""
        self.lost: dict[int, str] = {}
        """The others, and why."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Of every phase, and of gathering during `send`; like the bytes, of all attempts together."""
        self.sent_bytes = 0
        self.let_go: Callable[[], None] = lambda: None
        """Closes the group under the engines that wait in it; called once in a phase, from the calling thread."""
        self.learner_s: Callable[[], float] = lambda: 0.0
        """Seconds of the present attempt in which nothing could be sent, since the learner gathered."""
        self.version, self.digest = 0, ""
        """What the engines must acknowledge."""
        self._engine_ranks, self._timeout_s = engine_ranks, timeout_s

    def count(self, size: int) -> None:
        """So many bytes went onto the wire."""
        self.sent_bytes += size

    @property
    def world_size(self) -> int:
        """Of the group: the learner's rank 0 and all workers."""
        return 1 + len(self.members) * self._engine_ranks

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Give every engine ranks of its own in the group, after the learner's.

        Raises:
            EnginesLostError: not all of them got into it.
        """
        first = init_info["rank_offset"]
        offsets = {n: first + place * self._engine_ranks for place, n in enumerate(self.members)}
        self._together(
            "join",
            "join the weight group",
            lambda n, h: h.init_weight_transfer_engine.remote(init_info | {"rank_offset": offsets[n]}),
        )

    def start_weight_update(self) -> None:
        """Pause the engines.

        Raises:
            EnginesLostError: not all of them paused. The others are paused.
        """
        if self._each("pause", "pause for new weights", lambda _, h: h.start_weight_update.remote())[1]:
            raise EnginesLostError("an engine did not pause")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Have the engines receive, while the caller sends in another thread.

        Raises:
            EnginesLostError: not all of them received. The others are paused.
            BroadcastError: they were interrupted because the learner gathered for most of their time. All are paused.
        """
        self._together("send", "receive weights", lambda _, h: h.update_weights.remote(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Have the engines load what they received, compare what they acknowledge with what was sent, resume.

        Who fails is cut off; the others have got the weights.
        """
        loaded, _ = self._each("load", "load the weights", lambda _, h: h.finish_weight_update.remote(self.version))
        self._cut_off({n: reason for n, answer in loaded.items() if (reason := self._wrong(*answer))})
        self._each("resume", "resume", lambda _, h: h.resume.remote())

    def _wrong(self, version: int, digest: str) -> str:
        if (version, digest) == (self.version, self.digest):
            return ""
        return (
            f"acknowledged version {version} with checksum {digest or '-'}; "
            f"sent was version {self.version} with {self.digest or '-'}"
        )

    def _together(self, phase: str, what: str, call: Callable[[int, Any], Any]) -> None:
        """A phase in which the engines wait for one another: the first loss ends it for all."""
        answers, lost = self._each(phase, what, call, self.let_go)
        interrupted = {n: reason for n, reason in answers.items() if reason}
        if interrupted and not lost:
            if (own := self.learner_s()) > self._timeout_s / 2:
                limit = f"{self._timeout_s:g} s that engines wait for them (cluster.broadcast_timeout_s)"
                raise BroadcastError(f"the learner's ranks gathered weights for {own:.3g} s of the {limit}")
            # Nobody is known to be at fault. Cutting off one bounds the attempts.
            number, reason = next(iter(interrupted.items()))
            self._cut_off({number: f"did not {what}: {reason}"})
        if interrupted or lost:
            raise EnginesLostError(f"an engine did not {what}")

    def _each(
        self, phase: str, what: str, call: Callable[[int, Any], Any], let_go: Callable[[], None] | None = None
    ) -> tuple[dict[int, Any], dict[int, str]]:
        """Call every member, and cut off those that fail.

        Returns:
            answers, and who was cut off why.
        """
        began = time.monotonic()
        calls = {call(number, handle): number for number, handle in self.members.items()}
        answers, lost = self._collect(calls, what, let_go)
        self.seconds[phase] += time.monotonic() - began
        self._cut_off(lost)
        return answers, lost

    def _collect(
        self, calls: dict[Any, int], what: str, let_go: Callable[[], None] | None
    ) -> tuple[dict[int, Any], dict[int, str]]:
        answers: dict[int, Any] = {}
        lost: dict[int, str] = {}
        pending, end = list(calls), time.monotonic() + self._timeout_s
        while pending:
            done, pending = ray.wait(pending, timeout=max(0.0, end - time.monotonic()))
            for ref in done:
                try:
                    answers[calls[ref]] = ray.get(ref)
                except RayError as error:
                    lost[calls[ref]] = _reason(error, what)
            if let_go and (not done or lost or any(answers.values())):
                let_go()
                let_go, end = None, time.monotonic() + min(GRACE_S, self._timeout_s / 2)
            elif not done:
                break
        late = {calls[ref]: f"did not {what} within {self._timeout_s:g} s" for ref in pending}
        return answers, lost | late

    def _cut_off(self, lost: dict[int, str]) -> None:
        for number, reason in lost.items():
            del self.members[number]
            self.lost[number] = reason


def _reason(error: Exception, what: str) -> str:
    cause = getattr(error, "cause", None) or error
    line = next(iter(str(cause).strip().splitlines()), type(cause).__name__)[:300]
    return f"died when asked to {what}" if isinstance(error, RayActorError) else f"did not {what}: {line}"
