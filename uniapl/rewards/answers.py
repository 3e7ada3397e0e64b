"""Rewards that compare a response with one known answer: `exact_match` and `math`."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from uniapl.records import Prompt
from uniapl.rewards.types import RewardResult, UnscorableError, verifier_field

_ENDS = " \t\n.,;:!?\"'“”‘’`*"
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# A minus right after a letter, digit or closing bracket is an operator or a hyphen, not a sign.
_NUMBER = re.compile(rf"(?<![\w.)])-?(?:{_UNSIGNED})(?:\s*/\s*-?(?:{_UNSIGNED}))?|(?:{_UNSIGNED})")
_LATEX = [
    (re.compile(r"(?<=[0-9])\s*\\([dt]?frac)"), r" \\\1"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\[dt]?frac\s*([0-9])\s*([0-9])"), r"\1/\2"),
    (re.compile(r"\{,\}|\\,|\\!|\\ "), ","),
]


def exact_match(prompt: Prompt, response: str) -> RewardResult:
    """1 if the response is the verifier's `answer`, else 0.

    Both are compared in NFKC form, caseless, with runs of white space as one space and without
    punctuation, quotes and emphasis marks at their ends.
    """
    answer = verifier_field(prompt, "answer")
    expected = _normalised(str(answer)) if isinstance(answer, str | int | float) else ""
    if not expected:
        raise UnscorableError(f"prompt '{prompt.id}': answer {answer!r}; allowed: text with a letter or digit")
    right = _normalised(response) == expected
    return RewardResult(float(right), {"exact_match": right})


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_ENDS)


def math(prompt: Prompt, response: str) -> RewardResult:
    r"""1 if the response's number equals the verifier's `answer` as an exact fraction, else 0.

    The response's number is the last one inside its last `\boxed{}`, or its last number where
    nothing is boxed. Thousands separators, decimals, `a/b` and `\frac{a}{b}` are read; units,
    currency and percent signs are passed over; mixed numbers and exponents are not read.
    """
    answer = verifier_field(prompt, "answer")
    expected = last_number(str(answer)) if isinstance(answer, str | int | float) else None
    if expected is None:
        raise UnscorableError(f"prompt '{prompt.id}': answer {answer!r}; allowed: a number")
    boxed = _last_boxed(response)
    right = last_number(response if boxed is None else boxed) == expected
    return RewardResult(float(right), {"math": right})


def last_number(text: str) -> Fraction | None:
    """The last number of `text`, exactly; None where there is none, or it divides by zero."""
    found = _NUMBER.findall(_plain(text))
    if not found:
        return None
    over, _, under = found[-1].replace(",", "").partition("/")
    try:
        return Fraction(over.strip()) / Fraction(under.strip() or 1)
    except (ValueError, ZeroDivisionError):  # ValueError: more digits than Python converts
        return None


def only_number(text: str) -> Fraction | None:
    """The number that `text` is, but for white space, dollar signs and a full stop around it; else None."""
    plain = _plain(text).strip().removesuffix(".").strip(" $")
    return last_number(plain) if _NUMBER.fullmatch(plain) else None


def _plain(text: str) -> str:
    text = text.replace("−", "-")
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text


def _last_boxed(text: str) -> str | None:
    r"""What stands in the last complete `\boxed{...}`, braces inside it counted."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        begin = start + len("\\boxed{")
        for at in range(begin - 1, len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if depth == 0:
                return text[begin:at]
        start = text.rfind("\\boxed{", 0, start)
    return None
