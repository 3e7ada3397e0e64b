"""Rows as the model will see them: the chat template applied, and which of the text is trained on."""

from __future__ import annotations

from typing import Any

from uniapl.data.comparisons import Pair
from uniapl.data.encoding import ChatEncoder
from uniapl.data.errors import DataError
from uniapl.data.inspection.measure import Reader
from uniapl.data.reader import Row


def samples(reader: Reader, n: int, encoder: ChatEncoder | None) -> list[dict[str, Any]]:
    """At most `n` rows, evenly spread: `row`, `id`, and `parts` of `name`, `text` and `trained`.

    Trained means: its tokens are in the loss of demonstrations or, for a pair, what the discriminator judges. A row
    that cannot be used has no parts but an `error`.
    """
    n = min(n, len(reader))
    return [_sample(reader, i * len(reader) // n, encoder) for i in range(n)]


def _sample(reader: Reader, index: int, encoder: ChatEncoder | None) -> dict[str, Any]:
    try:
        row = reader[index]
        return {"row": index, "id": row.id, "parts": _parts(row, encoder)}
    except DataError as error:
        return {"row": index, "error": str(error)}


def _parts(row: Row | Pair, encoder: ChatEncoder | None) -> list[dict[str, Any]]:
    if encoder is None:
        parts = [_part(message["role"], message["content"], False) for message in row.messages]
    else:
        parts = [_part("prompt", _text(encoder, encoder.prompt_ids(row.messages)), False)]
    said = {"chosen": row.chosen, "rejected": row.rejected} if isinstance(row, Pair) else {"response": row.response}
    for name, text in said.items():
        if text is not None:
            parts.append(_part(name, _text(encoder, encoder.response_ids(text)) if encoder else text, True))
    return parts


def _part(name: str, text: str, trained: bool) -> dict[str, Any]:
    return {"name": name, "text": text, "trained": trained}


def _text(encoder: ChatEncoder, ids: list[int]) -> str:
    """The tokens as text, special ones too."""
    return str(encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
