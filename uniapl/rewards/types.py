"""What goes into a reward function and what comes out of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from uniapl.records import Prompt


@dataclass(frozen=True)
class ScoreRequest:
    """The responses of one group, to be scored against its prompt."""

    prompt: Prompt
    responses: list[str]


@dataclass(frozen=True)
class RewardResult:
    """A reward function's verdict on one response, with the outcome of each named check."""

    value: float
    checks: dict[str, bool] = field(default_factory=dict)


RewardCallable = Callable[[Prompt, str], "float | RewardResult"]


class UnscorableError(Exception):
    """A reward function cannot judge this response; the message says why, in one line."""


def verifier_field(prompt: Prompt, key: str) -> Any:
    """The value under `key` of the prompt's verifier.

    Raises:
        UnscorableError: there is no verifier, it is not a JSON object, or it has no such key.
    """
    if prompt.verifier is None:
        raise UnscorableError(f"prompt '{prompt.id}' has no verifier; allowed: JSON text with the key '{key}'")
    try:
        verifier = json.loads(prompt.verifier)
    except ValueError:
        raise UnscorableError(f"prompt '{prompt.id}': the verifier is not JSON text") from None
    if not isinstance(verifier, dict) or key not in verifier:
        raise UnscorableError(f"prompt '{prompt.id}': the verifier has no key '{key}'")
    return verifier[key]
