"""A rollout actor's side of the reward service."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import RayActorError

from uniapl.records import Prompt, Sample, Score
from uniapl.rewards.types import ScoreRequest

ATTEMPTS = 3
"""A reward replica may be lost with the calls that it works on: these are made again."""


class RewardClient:
    """Has samples scored, by the handle that `attach` was given last."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._attached = asyncio.Event()
        """Set, and replaced, when another handle comes."""

    def attach(self, handle: Any) -> None:
        """Ask `handle`, of the service's deployment, from now on, also what another has not answered yet."""
        self._handle = handle
        attached, self._attached = self._attached, asyncio.Event()
        attached.set()

    async def score(self, prompt: Prompt, samples: list[Sample]) -> None:
        """Score the samples; where every attempt is lost with its replica they are unscored, with that reason."""
        request, lost = ScoreRequest(prompt, [s.text for s in samples]), ""
        for _ in range(ATTEMPTS):
            try:
                scores = await self._ask(request)
                break
            except RayActorError as error:
                lost = f"reward service: {type(error).__name__} in each of {ATTEMPTS} attempts"
        else:
            scores = [Score(None, unscored=lost) for _ in samples]
        for sample, score in zip(samples, scores, strict=True):
            sample.score = score

    async def _ask(self, request: ScoreRequest) -> list[Score]:
        while True:
            attached = asyncio.ensure_future(self._attached.wait())
            answer = asyncio.ensure_future(self._handle.score.remote(request))
            try:
                await asyncio.wait([answer, attached], return_when=asyncio.FIRST_COMPLETED)
                if answer.done():
                    return answer.result()
            finally:
                answer.cancel()
                attached.cancel()
