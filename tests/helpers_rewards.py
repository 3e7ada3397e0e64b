"""Reward functions as a user would write them, and a prompt to score with them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniapl.records import Prompt
from uniapl.rewards import RewardResult

if TYPE_CHECKING:
    import pytest  # replicas of the reward service import this module

CALLS: list[str] = []
"""Responses that `length` was called with, in this process."""

not_callable = 3


def make_prompt(verifier: Any = None, expert: str | None = None, content: str = "Say something.") -> Prompt:
    """A prompt; a verifier that is not text is written as JSON."""
    text = verifier if verifier is None or isinstance(verifier, str) else json.dumps(verifier)
    return Prompt("p1", [{"role": "user", "content": content}], [1, 2], text, expert)


def hide_nltk_data(monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    """A machine may have NLTK's data: an empty search path makes it one that has not. No collaborator is replaced."""
    import nltk
    from if_verifiable.ifeval import instructions_util

    monkeypatch.setattr(nltk.data, "path", [str(empty)])
    for kept in (instructions_util._get_sentence_tokenizer, nltk.tokenize._get_punkt_tokenizer):
        kept.cache_clear()  # by an earlier test in this process


def length(prompt: Prompt, response: str) -> float:
    CALLS.append(response)
    return len(response)


def polite(prompt: Prompt, response: str) -> RewardResult:
    return RewardResult(float("please" in response), {"please": "please" in response})


def hangs_on_hang(prompt: Prompt, response: str) -> float:
    while response.startswith("hang"):
        time.sleep(0.05)
    if response.startswith("slow"):
        time.sleep(1.0)
    return 1.0


def raises(prompt: Prompt, response: str) -> float:
    raise KeyError("no such\nkey")


async def asynchronous(prompt: Prompt, response: str) -> float:
    return 1.0
