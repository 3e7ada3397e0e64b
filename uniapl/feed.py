"""What batches need, and the two sources that it is drawn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from uniapl.records import Demonstration, Prompt

T_co = TypeVar("T_co", covariant=True)
Needs = Callable[[int], tuple[int, int]]
"""Groups and demonstrations of batch k; the same whenever it is asked."""

ROW_COUNTERS = ("skipped_prompts", "skipped_demonstrations", "cut_experts")
"""Bad rows that were passed over, and expert responses that were longer than `data.max_response_tokens`."""


class Source(Protocol[T_co]):
    """An endless stream of records with a cursor that can be saved (JSON-able) and restored."""

    def next(self) -> T_co: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Feed:
    """Draws prompts and demonstrations, and checks that what a batch needs can be drawn.

    Args:
        prompts: None only when no batch needs groups.
        demonstrations: None only when no batch needs demonstrations.
        needs: what each batch holds.
    """

    def __init__(
        self, prompts: Source[Prompt] | None, demonstrations: Source[Demonstration] | None, needs: Needs
    ) -> None:
        self._prompts = prompts
        self._demonstrations = demonstrations
        self._needs = needs

    def groups(self, step: int) -> int:
        """How many groups batch `step` needs."""
        return self._needs(step)[0]

    def needs(self, step: int) -> tuple[int, int]:
        """Groups and demonstrations of batch `step`.

        Raises:
            ValueError: the batch would be empty, or needs a source that is None.
        """
        groups, demonstrations = self._needs(step)
        if groups + demonstrations == 0:
            raise ValueError(f"batch {step} would be empty: it needs no groups and no demonstrations")
        if groups and self._prompts is None:
            raise ValueError(f"prompts: no source, but batch {step} needs {groups} groups")
        if demonstrations and self._demonstrations is None:
            raise ValueError(f"demonstrations: no source, but batch {step} needs {demonstrations}")
        return groups, demonstrations

    def prompt(self) -> Prompt:
        """The next prompt.

        Raises:
            ValueError: there is no source of prompts.
        """
        if self._prompts is None:
            raise ValueError("prompts: no source, but a batch ahead needs groups")
        return self._prompts.next()

    def demonstrations(self, count: int) -> list[Demonstration]:
        """The next `count` demonstrations; none without a source."""
        source = self._demonstrations
        return [source.next() for _ in range(count)] if source else []

    def cursors(self) -> dict[str, dict[str, Any] | None]:
        """Where both sources stand; None of one that is not there."""
        return {
            "prompts": self._prompts.state_dict() if self._prompts else None,
            "demonstrations": self._demonstrations.state_dict() if self._demonstrations else None,
        }

    def rows(self) -> dict[str, int]:
        """`ROW_COUNTERS` of the rows read so far."""
        cursors = {name: cursor or {} for name, cursor in self.cursors().items()}
        skipped = {f"skipped_{name}": sum(cursor.get("skipped", {}).values()) for name, cursor in cursors.items()}
        return skipped | {"cut_experts": cursors["prompts"].get("cut", 0)}

    def load_cursors(self, state: dict[str, Any]) -> None:
        """Go on from `cursors`; a source that had none starts at its beginning."""
        for name, source in (("prompts", self._prompts), ("demonstrations", self._demonstrations)):
            if source and state[name] is not None:
                source.load_state_dict(state[name])
