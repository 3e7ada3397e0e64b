"""Rows of shards, made of a source's rows: sound, and each with a stable id."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow as pa

from uniapl.data.errors import DataError
from uniapl.data.importing.formats import Format, check_ignored
from uniapl.data.importing.records import Item, Record, Request, Source
from uniapl.data.importing.values import kind, printable, text, verifier_text
from uniapl.data.reader import sound_row
from uniapl.records import COMPARISON_SCHEMA, SHARD_SCHEMA

SOURCE = pa.field("source", pa.string())
"""A column more: the file and row that a row was imported from."""
TRAIN_SCHEMA, PAIR_SCHEMA = SHARD_SCHEMA.append(SOURCE), COMPARISON_SCHEMA.append(SOURCE)


class RowMaker:
    """Makes rows of `TRAIN_SCHEMA`, and beside them the key `rejected` where the format has pairs.

    Raises:
        DataError: the tokenizer that counts tokens cannot be used.
    """

    def __init__(self, request: Request) -> None:
        self._request, self._encoder = request, None
        if request.max_response_tokens is not None:
            from uniapl.data.encoding import ChatEncoder, check_template

            check_template(str(request.model))
            self._encoder = ChatEncoder.from_folder(str(request.model))

    def columns(self, form: Format) -> list[str]:
        """What is read of a source in this format."""
        r = self._request
        return [*form.needs, *form.also, *([r.verifier] if r.verifier else [])]

    def make(self, record: Record, form: Format, source: Source) -> dict[str, Any]:
        """The row.

        Args:
            record: as read.
            form: of its source.
            source: where it is from; of its name the last part is kept: folders differ from machine to machine.

        Raises:
            DataError: it cannot be used; the message names file, row and column.
        """
        try:
            if isinstance(record.values, DataError):
                raise record.values
            check_ignored(record.values, form, source.columns, self._request)
            item = form.read(record.values)
            verifier = self._verifier(record.values, form)
            row = {"id": _id(item, verifier), "messages": item.messages, "response": item.response}
            row |= {"verifier": verifier, "source": f"{printable(source.name.rsplit('/', 1)[-1])}:{record.row}"}
            sound_row({name: row[name] for name in SHARD_SCHEMA.names}, "")
            if item.rejected is not None:
                row |= {"chosen": item.response, "rejected": item.rejected}
                sound_row({"id": "x", "messages": item.messages, "response": item.rejected, "verifier": None}, "")
        except DataError as error:
            raise DataError(f"{record.where}: {str(error).removeprefix(': ')}", error.reason) from None
        if self._encoder and item.response is not None:
            longest = int(self._request.max_response_tokens or 0)
            if len(self._encoder.response_ids(item.response)) > longest:
                row["response"] = None
        return row

    def _verifier(self, values: dict[str, Any], form: Format) -> str | None:
        column = self._request.verifier or ("verifier" if form.name == "shard" else None)
        if column is None:
            return None
        return _VERIFIERS[self._request.verifier_is](values.get(column), column)


def _answer(value: Any, column: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps({"answer": value})
    return json.dumps({"answer": text(value, column, "answer")}, ensure_ascii=False)


def _number(value: Any, column: str) -> str:
    """The number, as the reward `math` reads it; a solution may stand before it and `####`, as in GSM8K."""
    from uniapl.rewards.answers import only_number

    allowed = "allowed: a number alone, or behind '####'"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"column {column}: {kind(value)}; {allowed}", "no number")
    said = str(value).rsplit("####", 1)[-1]
    number = only_number(said)
    if number is None:
        raise DataError(f"column {column}: got {said!r:.80}; {allowed}", "no number")
    return json.dumps({"answer": str(number)})


_VERIFIERS = {"object": verifier_text, "answer": _answer, "number": _number}


def _id(item: Item, verifier: str | None) -> str:
    """16 hexadecimal digits of the content: the same row has the same id in whatever file and place it stands."""
    content = json.dumps([item.messages, item.response, item.rejected, verifier])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def prompt_key(messages: list[dict[str, str]]) -> str:
    """16 digits that prompts share which differ in letter case, white space or system message alone."""
    said = [[m["role"], " ".join(m["content"].split()).casefold()] for m in messages if m["role"] != "system"]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=8).hexdigest()
