"""A discriminator of the user's own, named `module:Class` in the configuration.

The class is made once in each replica of the reward service, without arguments, and has one method,
`scores(comparisons) -> list[ExpertScores]`.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from uniapl.config_errors import ConfigError
from uniapl.discriminators.types import Comparison, ExpertScores
from uniapl.own_code import imported, short

_KEY = "objective.adversarial.discriminator"


def resolve_own(name: str) -> Callable[[], Any]:
    """The user's class, imported but not made.

    Raises:
        ConfigError: it cannot be imported, wants arguments, or has no method `scores`.
    """
    found = imported(_KEY, name, "module:Class")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ConfigError(f"{_KEY}: got '{name}', {short(error)}; allowed: a class without arguments") from None
    except ValueError:
        pass  # one written in C, which does not tell its parameters
    if inspect.isclass(found) and not callable(getattr(found, "scores", None)):
        raise ConfigError(f"{_KEY}: got '{name}', which has no method scores; allowed: one of (comparisons)")
    return found


class OwnDiscriminator:
    """The user's discriminator: one call at a time, and what it returns is checked."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._own = resolve_own(name)()
        self._lock = threading.Lock()

    def scores(self, comparisons: Sequence[Comparison]) -> list[ExpertScores]:
        """What the user's `scores` returned.

        Raises:
            ValueError: not one `ExpertScores` for each comparison, with a finite score for each response.
        """
        with self._lock:
            found = self._own.scores(comparisons)
        if not isinstance(found, list) or len(found) != len(comparisons):
            raise ValueError(f"{self._name} returned no list of {len(comparisons)} ExpertScores")
        for compared, scores in zip(comparisons, found, strict=True):
            if not isinstance(scores, ExpertScores) or len(scores.responses) != len(compared.responses):
                raise ValueError(f"{self._name} returned no ExpertScores of {len(compared.responses)} responses")
            if not all(math.isfinite(score) for score in (scores.reference, *scores.responses)):
                raise ValueError(f"{self._name} returned a score that is not finite")
        return found
