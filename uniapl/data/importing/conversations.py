"""Formats of whole conversations: the last assistant turn is the expert's response, what is before it the prompt."""

from __future__ import annotations

import json
import re
from typing import Any

from uniapl.data.errors import DataError
from uniapl.data.importing.records import Item
from uniapl.data.importing.values import kind, text, why_not_json

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_KNOWN = "system, user (human), assistant (gpt)"
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \n]?")

Messages = list[dict[str, str]]


def chat(values: dict[str, Any], column: str = "messages") -> Item:
    """`messages`: a list of {"role", "content"} or of {"from", "value"}."""
    return split(with_system(messages_of(values.get(column), column), values), column)


def sharegpt(values: dict[str, Any]) -> Item:
    """`conversations`: as `messages`, usually of {"from", "value"}; `system`, where there is one, comes first."""
    return chat(values, "conversations")


def with_system(messages: Messages, values: dict[str, Any]) -> Messages:
    """The messages behind the row's `system` text, where it has one and they begin with none."""
    system = values.get("system")
    if not isinstance(system, str) or not system.strip() or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def split(messages: Messages, column: str) -> Item:
    """A conversation up to its last assistant turn; turns behind that one are left out.

    Raises:
        DataError: no assistant turn, or no user's turn right before the last one.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise DataError(f"column {column}: no assistant turn; allowed: at least one", "no assistant turn")
    prompt = messages[:last]
    if not any(message["role"] == "user" for message in prompt):
        raise DataError(f"column {column}: no user turn before the last assistant turn; allowed: one", "no user turn")
    if prompt[-1]["role"] != "user":
        role = prompt[-1]["role"]
        raise DataError(
            f"column {column}: message {last}: the assistant answers '{role}'; allowed: a turn of the user",
            "order of roles",
        )
    return Item(prompt, messages[last]["content"])


def messages_of(value: Any, column: str) -> Messages:
    """A list of messages, which may be written as JSON text (in a CSV file), with the roles of the shards.

    Raises:
        DataError: it is something else, or a message has no text or an unknown role.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"column {column}: not JSON ({why_not_json(error)}); allowed: a list of messages", "not JSON"
            ) from None
    if not isinstance(value, list):
        raise DataError(f"column {column}: {kind(value)}; allowed: a list of messages", "wrong type")
    if not value:
        raise DataError(f"column {column}: empty; allowed: at least one message", "no messages")
    return [_message(message, f"{column}: message {i}") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"column {where}: {kind(message)}; allowed: an object with role and content", "wrong type")
    role = message.get("role") or message.get("from")
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise DataError(f"column {where}: role {role!r:.80}; allowed: {_KNOWN}", "bad role")
    if message.get("tool_calls"):
        raise DataError(f"column {where}: a call of a tool; allowed: text", "tool call")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # as OpenAI writes parts of a message
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in texts):
            raise DataError(f"column {where}: a part that is no text; allowed: text", "wrong type")
        content = "".join(map(str, texts))
    return {"role": _ROLES[role.lower()], "content": text(content, where, "message")}


def transcript(value: str, column: str) -> Messages:
    """Turns written as `Human: …` and `Assistant: …`, each after an empty line (Anthropic's hh-rlhf).

    Raises:
        DataError: it begins with something else.
    """
    parts = _TURN.split(value.strip())
    if parts[0].strip() or len(parts) < 3:
        raise DataError(
            f"column {column}: no transcript; allowed: one that begins with 'Human:', or a column prompt beside it",
            "no prompt",
        )
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [
        {
            "role": _ROLES[{"Human": "human"}.get(who, "gpt")],
            "content": text(said.strip(), f"{column}: turn {i}", "message"),
        }
        for i, (who, said) in enumerate(turns)
    ]
