"""Rewards `ifeval` and `ifbench`: verifiable instructions, checked by the package if-verifiable.

The verifier of a prompt is `{"instructions": [{"id": "keywords:existence", "kwargs": {...}}, ...]}`.
The reward is binary and strict: 1 if the response follows every instruction, else 0.
"""

from __future__ import annotations

import functools
import re
import threading
from typing import Any

from uniapl.records import Prompt
from uniapl.rewards.types import RewardResult, UnscorableError, verifier_field

_LOADING = threading.Lock()
_NLTK_RESOURCE = re.compile(r"nltk\.download\(\S*?'(\w+)'")


def ifeval(prompt: Prompt, response: str) -> RewardResult:
    """1 if the response follows all the prompt's IFEval instructions, else 0; outcomes per id."""
    return _follows("ifeval", prompt, response)


def ifbench(prompt: Prompt, response: str) -> RewardResult:
    """1 if the response follows all the prompt's IFBench instructions, else 0; outcomes per id."""
    return _follows("ifbench", prompt, response)


def registry(benchmark: str) -> dict[str, Any]:
    """Checker class by instruction id, of `ifeval` or `ifbench`; the first call takes seconds."""
    with _LOADING:
        return _load(benchmark)


@functools.cache
def _load(benchmark: str) -> dict[str, Any]:
    import langdetect
    from langdetect import detector_factory

    # Unseeded, the same text gets different languages. Its profiles load at the first call and
    # without a lock, so a second thread would see half of them.
    langdetect.DetectorFactory.seed = 0
    detector_factory.init_factory()
    if benchmark == "ifeval":
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

        return dict(INSTRUCTION_DICT)
    return _load_ifbench()


def _load_ifbench() -> dict[str, Any]:
    """IFBench's registry without the downloads that its import attempts.

    Which instructions can be checked must not depend on whether a host on the internet answered.
    """
    import nltk

    download = nltk.download
    nltk.download = lambda *_args, **_kwargs: False
    try:
        from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT
    finally:
        nltk.download = download
    return dict(INSTRUCTION_DICT)


def _follows(benchmark: str, prompt: Prompt, response: str) -> RewardResult:
    checkers = registry(benchmark)
    from if_verifiable.common import strip_thinking

    instructions = verifier_field(prompt, "instructions")
    if not isinstance(instructions, list) or not instructions:
        raise UnscorableError(f"prompt '{prompt.id}': 'instructions' is not a list with at least one entry")
    answer = strip_thinking(response)
    checks: dict[str, bool] = {}
    for instruction in instructions:
        name, checker = _checker(prompt, instruction, benchmark, checkers)
        followed = bool(answer.strip()) and check(name, checker, answer)
        checks[name] = checks.get(name, True) and followed
    return RewardResult(float(all(checks.values())), checks)


def _checker(prompt: Prompt, instruction: Any, benchmark: str, checkers: dict[str, Any]) -> tuple[str, Any]:
    """An instruction's id and its checker, set up with the arguments that the verifier names."""
    if not isinstance(instruction, dict) or not isinstance(instruction.get("id"), str):
        raise UnscorableError(f"prompt '{prompt.id}': an instruction is not of the form {{'id': ..., 'kwargs': ...}}")
    name, kwargs = instruction["id"], instruction.get("kwargs") or {}
    if name not in checkers:
        raise UnscorableError(f"prompt '{prompt.id}': unknown {benchmark} instruction '{name}'")
    if not isinstance(kwargs, dict):
        raise UnscorableError(f"prompt '{prompt.id}': the kwargs of '{name}' are not an object")
    checker = checkers[name](name)
    given = {key: value for key, value in kwargs.items() if value is not None}
    try:
        checker.build_description(**given)
    except (TypeError, ValueError) as error:
        raise UnscorableError(f"prompt '{prompt.id}': the kwargs of '{name}': {error}") from None
    if drawn := not_taken(given, checker.get_instruction_args() or {}):
        raise UnscorableError(f"prompt '{prompt.id}': the kwargs of '{name}': {drawn}; allowed: a value it takes")
    return name, checker


def not_taken(given: dict[str, Any], used: dict[str, Any]) -> str:
    """Checkers draw at random what is missing or out of range, and then check what nobody asked.

    Returns:
        the first such argument and what was given, or nothing.
    """
    for key, value in used.items():
        if key not in given or _comparable(given[key]) != _comparable(value):
            return f"{key} is {given.get(key)!r}"
    return ""


def _comparable(value: Any) -> Any:
    """Checkers strip, lower and sort the texts that they are given."""
    if isinstance(value, str):
        return value.strip().lower()
    if isinstance(value, list | tuple | set):
        return sorted({str(item).strip().lower() for item in value})
    return value


def check(name: str, checker: Any, answer: str) -> bool:
    """Whether an answer follows what `checker` was set up for.

    Raises:
        UnscorableError: the checker needs data of NLTK's that is not there.
    """
    try:
        return bool(checker.check_following(answer))
    except LookupError as error:
        resource = _NLTK_RESOURCE.search(re.sub(r"\x1b\[\d+m", "", str(error)))
        if resource is None:
            raise
        needed = resource.group(1)
        raise UnscorableError(f"'{name}' needs NLTK data: python -m nltk.downloader {needed}") from None
