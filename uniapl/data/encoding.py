"""Messages and responses as token ids, by a tokenizer's own chat template."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from uniapl.data.bounded import ExceededError, bounded
from uniapl.data.errors import DataError

_MARK = "response"
_TURNS = [{"role": "user", "content": "prompt"}, {"role": "assistant", "content": _MARK}]
_TEMPLATE = "one that renders a user's and an assistant's turn"
_PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Names of transformers' class for a tokenizer that is all in tokenizer.json."""
MAX_RENDERED = 16 << 20
"""Characters of a rendered prompt."""
TEMPLATE_S, TEMPLATE_BYTES = 10.0, 1 << 30
"""What rendering two short prompts may take: see `check_template`."""


class ChatEncoder:
    """Token ids of prompts and responses.

    Raises:
        DataError: the tokenizer has no chat template, it fails or leaves the messages out, or no end-of-turn
            token can be told.
    """

    def __init__(self, tokenizer: Any) -> None:
        name = tokenizer.name_or_path
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(f"{name}: no chat template; allowed: a tokenizer with one")
        self.tokenizer = tokenizer
        try:
            prompt = self._render([{"role": "user", "content": _MARK}])
            answered = tokenizer.apply_chat_template(_TURNS, tokenize=False)
        except Exception as error:  # a template is a program, and may raise anything
            raise DataError(f"{name}: chat template: {_short(error)}; allowed: {_TEMPLATE}") from None
        if _MARK not in prompt or not tokenizer.encode(prompt, add_special_tokens=False):
            raise DataError(f"{name}: chat template: makes {prompt!r:.60} of a message; allowed: {_TEMPLATE}")
        self.end_of_turn = _end_of_turn(tokenizer, answered)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatEncoder:
        """The encoder of a Hugging Face folder.

        Raises:
            DataError: no such folder, no tokenizer in it, or no chat template.
        """
        return cls(read_tokenizer(folder))

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The messages up to where the assistant's answer begins.

        Raises:
            DataError: the template refuses the messages, for example two user turns in a row.
        """
        try:
            text = self._render(messages)
        except Exception as error:  # a template is a program, and may raise anything
            reason = "chat template"
            raise DataError(
                f"column messages: the chat template refuses them: {_short(error)}; allowed: turns that it takes",
                reason,
            ) from None
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _render(self, messages: list[dict[str, str]]) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if len(text) > MAX_RENDERED:
            raise DataError(f"it makes {len(text)} characters of them; allowed: <= {MAX_RENDERED}")
        return str(text)

    def response_ids(self, text: str) -> list[int]:
        """The text's tokens and one end-of-turn token; text that spells a special token stays text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [*ids, self.end_of_turn]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def check_template(folder: str | Path) -> None:
    """Try the folder's chat template out where it can do no harm, before `ChatEncoder` uses it in this process.

    A template is a program without limits: one that loops for ever, or builds gigabytes, is stopped after
    `TEMPLATE_S` seconds or `TEMPLATE_BYTES` more memory.

    Raises:
        DataError: as `ChatEncoder.from_folder`, or the template was stopped.
    """
    tokenizer = read_tokenizer(folder)

    def problem() -> str:
        try:
            ChatEncoder(tokenizer)
        except DataError as error:
            return str(error)
        return ""

    try:
        found = bounded(problem, TEMPLATE_S, TEMPLATE_BYTES)
    except ExceededError as error:
        found = f"{folder}: chat template: {error}; allowed: {_TEMPLATE}"
    if found:
        raise DataError(found)


def read_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder.

    Raises:
        DataError: no such folder, or no readable tokenizer in it.
    """
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; allowed: a Hugging Face folder with a chat template")
    try:
        return _tokenizer(Path(folder))
    except Exception as error:  # broken files raise nearly anything, tokenizers' own a bare Exception
        raise DataError(f"{folder}: no readable tokenizer ({_short(error)}); allowed: a Hugging Face folder") from None


def _short(error: Exception) -> str:
    """What an exception says, with its kind where it says it in words of Python's."""
    from jinja2 import TemplateError

    said = " ".join(str(error).split())[:200]
    plain = isinstance(error, TemplateError | DataError | OSError) or type(error) in (ValueError, Exception)
    return said if plain and said else f"{type(error).__name__}: {said}"


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

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _end_of_turn(tokenizer: Any, rendered: str) -> int:
    """The special token with which the template closes an assistant's turn, else the end-of-sequence token.

    Args:
        rendered: `_TURNS` by the template.
    """
    tail = rendered[rendered.rindex(_MARK) + len(_MARK) :] if _MARK in rendered else ""
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    for token in tokenizer.encode(tail, add_special_tokens=False):
        if token in special:
            return int(token)
    if tokenizer.eos_token_id is None:
        raise DataError(f"{tokenizer.name_or_path}: neither the chat template nor the tokenizer ends a turn; "
                        "allowed: an end-of-turn or end-of-sequence token")  # fmt: skip
    return int(tokenizer.eos_token_id)
