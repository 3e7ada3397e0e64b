"""IFEval constraints: which ones the local data set uses, which go together, and how they are verified."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import langdetect
from if_verifiable.ifeval.instructions_registry import INSTRUCTION_CONFLICTS, INSTRUCTION_DICT

LOWERCASE, CAPITAL = "change_case:english_lowercase", "change_case:english_capital"
QUOTATION, END, NO_COMMA = "startend:quotation", "startend:end_checker", "punctuation:no_comma"
EXISTENCE, FREQUENCY = "keywords:existence", "keywords:frequency"
FORBIDDEN, LETTERS = "keywords:forbidden_words", "keywords:letter_frequency"
HIGHLIGHT, BULLETS = "detectable_format:number_highlighted_sections", "detectable_format:number_bullet_lists"
TITLE, SECTIONS, JSON = (
    "detectable_format:title",
    "detectable_format:multiple_sections",
    "detectable_format:json_format",
)
POSTSCRIPT, PLACEHOLDERS = "detectable_content:postscript", "detectable_content:number_placeholders"
WORDS, PARAGRAPHS = "length_constraints:number_words", "length_constraints:number_paragraphs"
FIRST_WORD, TWO_RESPONSES = "length_constraints:nth_paragraph_first_word", "combination:two_responses"

# How often a constraint is drawn, relative to the others.
WEIGHTS: dict[str, float] = {
    LOWERCASE: 3,
    CAPITAL: 2,
    QUOTATION: 3,
    HIGHLIGHT: 3,
    EXISTENCE: 3,
    FREQUENCY: 2,
    FORBIDDEN: 1.5,
    LETTERS: 1.5,
    NO_COMMA: 2,
    BULLETS: 2,
    TITLE: 2.5,
    POSTSCRIPT: 2.5,
    PLACEHOLDERS: 2,
    END: 2.5,
    WORDS: 2.5,
    PARAGRAPHS: 1.5,
    FIRST_WORD: 1.5,
    SECTIONS: 1,
    TWO_RESPONSES: 2.5,
    JSON: 1,
}
COUNT_WEIGHTS = {1: 5.0, 2: 3.5, 3: 1.5}

_STRUCTURES = {BULLETS, PARAGRAPHS, FIRST_WORD, SECTIONS, TWO_RESPONSES, JSON}
_OWN_CONFLICTS = [
    {POSTSCRIPT, END},  # both want to stand last
    {SECTIONS, LOWERCASE},  # the marker's case is fixed
    {SECTIONS, CAPITAL},
    {QUOTATION, BULLETS},  # the mark would hide the first bullet
    {CAPITAL, FIRST_WORD},
    {EXISTENCE, FREQUENCY},  # both add sentences: too long together
]


def conflict(a: str, b: str) -> bool:
    """Whether two constraints cannot stand in one prompt."""
    declared = b in INSTRUCTION_CONFLICTS.get(a, ()) or a in INSTRUCTION_CONFLICTS.get(b, ())
    return a == b or declared or {a, b} <= _STRUCTURES or {a, b} in _OWN_CONFLICTS


def draw_constraints(rng: random.Random) -> list[str]:
    """One to three constraints that go together."""
    count = rng.choices(list(COUNT_WEIGHTS), list(COUNT_WEIGHTS.values()))[0]
    chosen: list[str] = []
    while len(chosen) < count:
        free = [c for c in WEIGHTS if not any(conflict(c, other) for other in chosen)]
        if not free:
            break
        chosen.append(rng.choices(free, [WEIGHTS[c] for c in free])[0])
    return chosen


def describe(constraint: str, kwargs: dict[str, Any]) -> str:
    """The checker's own sentence for a constraint, with every argument given."""
    return str(INSTRUCTION_DICT[constraint](constraint).build_description(**kwargs))


def failed(instructions: list[dict[str, Any]], response: str) -> list[str]:
    """The constraints that a response does not follow (strict), the same at every call."""
    with _fixed_language_detection():
        return [i["id"] for i in instructions if not _follows(i["id"], i["kwargs"], response)]


def _follows(constraint: str, kwargs: dict[str, Any], response: str) -> bool:
    checker = INSTRUCTION_DICT[constraint](constraint)
    checker.build_description(**kwargs)
    return bool(response.strip() and checker.check_following(response))


@contextmanager
def _fixed_language_detection() -> Iterator[None]:
    """Language detection draws at random unless its seed is set, which is global."""
    before = langdetect.DetectorFactory.seed
    langdetect.DetectorFactory.seed = 0
    try:
        yield
    finally:
        langdetect.DetectorFactory.seed = before
