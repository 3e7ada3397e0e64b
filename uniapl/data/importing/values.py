"""Single values of a row, checked."""

from __future__ import annotations

import json
import os
from typing import Any

from uniapl.data.errors import DataError


def text(value: Any, where: str, what: str) -> str:
    """The value as text that says something.

    Args:
        value: of the row.
        where: the column, and the place in it.
        what: `prompt`, `response` or `message`: part of the reason under which a bad row is counted.

    Raises:
        DataError: it is no text, empty, or cannot be written as UTF-8.
    """
    if not isinstance(value, str):
        reason = f"empty {what}" if value is None else "wrong type"
        raise DataError(f"column {where}: {kind(value)}; allowed: text", reason)
    if not value.strip():
        raise DataError(f"column {where}: empty; allowed: text", f"empty {what}")
    return utf8(value, where)


def utf8(value: str, where: str) -> str:
    r"""The text, unless it holds half of a surrogate pair, such as JSON's `\ud800`."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"column {where}: {error}; allowed: UTF-8 text", "not UTF-8") from None
    return value


def kind(value: Any) -> str:
    """What a value is, in words."""
    names = {"NoneType": "null", "str": "text", "dict": "an object", "list": "a list", "bool": "a boolean"}
    name = type(value).__name__
    return names.get(name, "a number" if name in ("int", "float") else f"a {name}")


def why_not_json(error: Exception) -> str:
    """What is wrong with a JSON text, in one place of one line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def printable(name: str) -> str:
    """A file's name as text: names need not be UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


def verifier_text(value: Any, column: str) -> str | None:
    """A verifier as JSON text: of an object, or text that holds one; None for none.

    Raises:
        DataError: it is something else.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"column {column}: not JSON ({why_not_json(error)}); allowed: a JSON object", "bad verifier"
            ) from None
    if not isinstance(value, dict):
        raise DataError(f"column {column}: {kind(value)}; allowed: a JSON object", "bad verifier")
    found = json.dumps(value, ensure_ascii=False)
    return utf8(found, column)
