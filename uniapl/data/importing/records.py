"""What passes between the parts of an import."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from uniapl.data.errors import DataError


@dataclass(frozen=True)
class Record:
    """One row of a source."""

    row: int
    """From 0, blank lines not counted."""
    where: str
    """Such as `chats.jsonl: row 3 (line 4)`, for messages."""
    values: dict[str, Any] | DataError
    """By column; the error of a row that cannot be read, whose message does not name the row."""
    at: int
    """How far the source is read, in the unit of its `size`."""


class Source(Protocol):
    """A file or data set whose rows are read one at a time."""

    name: str
    columns: list[str]
    """Of the first rows, any of them: rows of a JSON file may differ in their columns."""
    size: int | None
    """Bytes, for a Hugging Face data set rows; None: not known beforehand."""

    def identity(self, told: Callable[[int], None]) -> dict[str, Any]:
        """What tells whether the source is still the same: for a file its name, bytes and SHA-256.

        Args:
            told: called with the bytes that were read so far.
        """

    def rows(self, start: int, columns: list[str]) -> Iterator[Record]:
        """The rows from number `start` on; of the columns, a source may leave out those not in `columns`."""


@dataclass(frozen=True)
class Item:
    """What a format makes of a row: a prompt with the expert's response, of a preference pair also the other one."""

    messages: list[dict[str, str]]
    response: str | None
    rejected: str | None = None


@dataclass(frozen=True)
class Request:
    """An import as the user asks for it."""

    inputs: list[str]
    """Paths, globs, or `hf:NAME[:SPLIT[:CONFIG]]`."""
    out: Path
    format: str | None = None
    """None: told from the columns."""
    prompt: str | None = None
    """Column of the prompt, in the format `plain`; None: one of the usual names."""
    response: str | None = None
    """Column of the response, likewise."""
    verifier: str | None = None
    """Column of what the reward functions judge by."""
    verifier_is: Literal["object", "answer", "number"] = "object"
    """It is the verifier, a JSON object, itself; the text of its `answer`; a number that is, perhaps behind `####`."""
    on_bad_row: Literal["error", "skip"] = "error"
    rows_per_shard: int = 50_000
    shards: int | None = None
    """Number of training shards; None: as many as `rows_per_shard` makes."""
    heldout: int = 0
    """Prompts that are kept out of training."""
    model: str | None = None
    """Folder of the tokenizer that `max_response_tokens` counts with."""
    max_response_tokens: int | None = None
    """A longer response is left out, and its row stays as a prompt alone."""
