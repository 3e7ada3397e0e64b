"""Messages and responses as token ids, by a tokenizer's own chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uniapl.data.errors import DataError

_MARK = "response"
_PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Names of transformers' class for a tokenizer that is all in tokenizer.json."""


class ChatEncoder:
    """Token ids of prompts and responses.

    Raises:
        DataError: the tokenizer has no chat template, or no end-of-turn token can be told.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(f"{tokenizer.name_or_path}: no chat template; allowed: a tokenizer with one")
        self.tokenizer = tokenizer
        self.end_of_turn = _end_of_turn(tokenizer)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatEncoder:
        """The encoder of a Hugging Face folder.

        Raises:
            DataError: no such folder, no tokenizer in it, or no chat template.
        """
        if not Path(folder).is_dir():
            raise DataError(f"{folder}: no such folder; allowed: a Hugging Face folder with a chat template")
        try:
            tokenizer = _tokenizer(Path(folder))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: no readable tokenizer ({error}); allowed: a Hugging Face folder") from None
        return cls(tokenizer)

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The messages up to where the assistant's answer begins.

        Raises:
            DataError: the template refuses the messages, for example two user turns in a row.
        """
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError) as error:
            reason = "chat template"
            raise DataError(f"column messages: the chat template refuses them: {error}", reason) from None
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def response_ids(self, text: str) -> list[int]:
        """The text's tokens and one end-of-turn token; text that spells a special token stays text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [*ids, self.end_of_turn]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, as `AutoTokenizer` would load it.

    That class imports torch and generation code, which takes seconds; a folder whose tokenizer is the plain
    fast one, without code of its own, does not need it.
    """
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if said.get("tokenizer_class") in _PLAIN and "auto_map" not in said and (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _end_of_turn(tokenizer: Any) -> int:
    """The special token with which the template closes an assistant's turn, else the end-of-sequence token."""
    turns = [{"role": "user", "content": "prompt"}, {"role": "assistant", "content": _MARK}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    tail = rendered[rendered.rindex(_MARK) + len(_MARK) :] if _MARK in rendered else ""
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    for token in tokenizer.encode(tail, add_special_tokens=False):
        if token in special:
            return int(token)
    if tokenizer.eos_token_id is None:
        raise DataError(f"{tokenizer.name_or_path}: neither the chat template nor the tokenizer ends a turn; "
                        "allowed: an end-of-turn or end-of-sequence token")  # fmt: skip
    return int(tokenizer.eos_token_id)
