"""What goes into a frozen discriminator and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Comparison:
    """Responses to one prompt, to be compared with the expert's response to it."""

    messages: Sequence[dict[str, str]]
    expert: str
    responses: Sequence[str]


@dataclass(frozen=True)
class ExpertScores:
    """One finite score per response, and what the expert's own response scores. Higher is closer to the expert."""

    reference: float
    responses: list[float]


class Discriminator(Protocol):
    """Scores responses against the expert's; safe to call from several threads."""

    def scores(self, comparisons: Sequence[Comparison]) -> list[ExpertScores]: ...
