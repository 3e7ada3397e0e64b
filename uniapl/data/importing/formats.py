"""What the columns of a row mean: the formats, and which one a source has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uniapl.data.errors import DataError
from uniapl.data.importing.conversations import (
    Messages,
    chat,
    messages_of,
    sharegpt,
    split,
    transcript,
    with_system,
)
from uniapl.data.importing.records import Item, Request
from uniapl.data.importing.values import kind, text

PROMPTS = ("prompt", "question", "problem", "query", "instruction", "input")
RESPONSES = ("response", "completion", "answer", "solution", "output")


@dataclass(frozen=True)
class Format:
    """A format: `read` makes an `Item` of a row's values, or raises a DataError that names the column."""

    name: str
    needs: tuple[str, ...]
    """Columns without which a row cannot be of this format."""
    also: tuple[str, ...]
    """Columns that it reads where they are there."""
    read: Callable[[dict[str, Any]], Item]


def _alpaca(values: dict[str, Any]) -> Item:
    """Instruction and, after an empty line, input; `history` holds earlier turns as [instruction, output] pairs."""
    prompt = text(values.get("instruction"), "instruction", "prompt")
    further = values.get("input")
    if further is not None and not isinstance(further, str):
        raise DataError(f"column input: {kind(further)}; allowed: text", "wrong type")
    if further and further.strip():
        prompt += "\n\n" + text(further, "input", "prompt")
    turns = [*_history(values.get("history")), {"role": "user", "content": prompt}]
    return Item(with_system(turns, values), text(values.get("output"), "output", "response"))


def _history(value: Any) -> Messages:
    turns = []
    for number, pair in enumerate(value or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(
                f"column history: turn {number}: {kind(pair)}; allowed: [instruction, output]", "wrong type"
            )
        for role, said in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": text(said, f"history: turn {number}", "message")})
    return turns


def _shard(values: dict[str, Any]) -> Item:
    """The columns of the shards themselves."""
    response = values.get("response")
    return Item(
        messages_of(values.get("messages"), "messages"),
        None if response is None else text(response, "response", "response"),
    )


def plain(prompt: str, response: str | None) -> Format:
    """A column of prompts and, unless None, one of responses; null there is no response, the row a prompt alone."""

    def read(values: dict[str, Any]) -> Item:
        messages = with_system(_prompt(values.get(prompt), prompt), values)
        said = values.get(response) if response else None
        return Item(messages, None if said is None else _answer(said, str(response)))

    needs = (prompt,) if response is None else (prompt, response)
    return Format("plain", needs, ("system",), read)


def _prompt(value: Any, column: str) -> Messages:
    """Text, or messages of which the last is the user's."""
    if not isinstance(value, list):
        return [{"role": "user", "content": text(value, column, "prompt")}]
    return messages_of(value, column)


def _answer(value: Any, column: str) -> str:
    """Text, or a list of one message of the assistant."""
    if not isinstance(value, list):
        return text(value, column, "response")
    messages = messages_of(value, column)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DataError(f"column {column}: {len(messages)} messages; allowed: one of the assistant", "order of roles")
    return messages[0]["content"]


def _preference(values: dict[str, Any]) -> Item:
    """`chosen` and `rejected`: texts or answers beside a prompt, whole conversations, or transcripts."""
    chosen, rejected = (_side(values, name) for name in ("chosen", "rejected"))
    if chosen.messages != rejected.messages:
        raise DataError("column rejected: another prompt than in chosen; allowed: the same", "different prompts")
    if chosen.response == rejected.response:
        raise DataError("column rejected: the same response as in chosen; allowed: another", "equal responses")
    return Item(chosen.messages, chosen.response, rejected.response)


def _side(values: dict[str, Any], name: str) -> Item:
    value = values.get(name)
    prompt = next((column for column in PROMPTS if values.get(column) is not None), None)
    whole = isinstance(value, list) and len(value) > 1
    if whole:
        return split(with_system(messages_of(value, name), values), name)
    if prompt is not None:
        return Item(with_system(_prompt(values[prompt], prompt), values), _answer(value, name))
    if isinstance(value, list):
        return split(messages_of(value, name), name)
    return split(with_system(transcript(text(value, name, "response"), name), values), name)


FORMATS = {
    made.name: made
    for made in (
        Format("preference", ("chosen", "rejected"), ("system", *PROMPTS), _preference),
        Format("shard", ("messages", "response"), ("verifier",), _shard),
        Format("chat", ("messages",), ("system",), chat),
        Format("sharegpt", ("conversations",), ("system",), sharegpt),
        Format("alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
    )
}
"""In the order in which a source's columns are tried; the last resort is `plain`."""
NAMES = (*FORMATS, "plain")


def format_of(name: str, columns: list[str], request: Request) -> Format:
    """The format of a source with these columns.

    Raises:
        DataError: the format asked for does not go with the columns, or none does.
    """
    if request.prompt or request.response:
        return _fitting(name, columns, _plain_of(columns, request))
    if request.format and request.format != "plain":
        return _fitting(name, columns, FORMATS[request.format])
    if request.format is None:
        for made in FORMATS.values():
            if set(made.needs) <= set(columns):
                return made
    return _fitting(name, columns, _plain_of(columns, request))


def _plain_of(columns: list[str], request: Request) -> Format | None:
    prompt = request.prompt or next((c for c in PROMPTS if c in columns), None)
    if prompt is None:
        return None
    response = request.response or next((c for c in RESPONSES if c in columns and c != prompt), None)
    return plain(prompt, response)


def _fitting(name: str, columns: list[str], made: Format | None) -> Format:
    shown = f"{', '.join(columns)}"[:300]
    if made is None:
        raise DataError(
            f"{name}: no known format has the columns {shown}; allowed: messages, conversations, instruction and "
            "output, chosen and rejected, or --prompt COLUMN and --response COLUMN"
        )
    for column in made.needs:
        if column not in columns:
            raise DataError(f"{name}: column {column}: missing, for the format {made.name}; allowed: {shown}")
    return made


def check_ignored(values: dict[str, Any], made: Format, columns: list[str], request: Request) -> None:
    """See that a row of a source, told by its first rows to have these columns, says nothing that its format ignores.

    Raises:
        DataError: the row has a column that calls for another format, or its response in another one than is read.
    """
    new = [name for name, value in values.items() if value is not None and name not in columns]
    other = format_of("", [*columns, *new], request) if new else made
    if late := next((column for column in other.needs if column not in made.needs), None):
        raise DataError(
            f"column {late}: in none of the first rows, by which the format is {made.name}, which ignores it; "
            "allowed: rows of one form, with the column in one of the first 100",
            "late column",
        )
    if made.name != "plain" or request.response or any(column in values for column in made.needs[1:]):
        return
    used = {*made.needs, request.verifier}
    if ignored := next((c for c in RESPONSES if c not in used and values.get(c) is not None), None):
        raise DataError(
            f"column {ignored}: a response, where other rows have it in {made.needs[-1]}; "
            "allowed: one column of responses, which may be null",
            "another column",
        )
