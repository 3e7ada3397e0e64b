"""Which instructions a response follows, strictly and loosely, as the published IFEval and IFBench judge.

Strict: the response as it is. Loose: it, or it without its first line, its last line or both, each also without
asterisks: the first variant that follows counts (Zhou et al. 2023, arXiv 2311.07911, section 2.2).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

from uniapl.rewards.instructions import check, not_taken, registry
from uniapl.rewards.types import UnscorableError

BENCHMARKS = ("ifeval", "ifbench")
"""Their instructions have no id in common."""
PROBE = "The first sentence is short. Here is the second one!\n\nAnd a second paragraph."


@dataclass(frozen=True)
class Instruction:
    """What a prompt asks for that can be checked."""

    id: str
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Whether a response follows an instruction; None: it cannot be told, for a reason."""

    instruction: str
    strict: bool | None = None
    loose: bool | None = None
    reason: str = ""


def benchmark_of(instruction: str) -> str:
    """The benchmark whose verifiers know an instruction's id.

    Raises:
        UnscorableError: none does.
    """
    for benchmark in BENCHMARKS:
        if instruction in registry(benchmark):
            return benchmark
    raise UnscorableError(f"unknown instruction '{instruction}'; allowed: one of IFEval's or IFBench's")


def judge(instructions: list[Instruction], prompt: str, response: str, skipped: dict[str, str]) -> list[Verdict]:
    """One verdict for each instruction.

    Args:
        instructions: of the prompt.
        prompt: its text; some verifiers compare with it.
        response: the model's, in which what stands before `</think>` is no part of the answer.
        skipped: instructions that cannot be judged, from `unavailable`.
    """
    answer = without_thinking(response)
    return [_verdict(one, prompt, answer) if one.id not in skipped else Verdict(one.id) for one in instructions]


def _verdict(instruction: Instruction, prompt: str, answer: str) -> Verdict:
    checker, _ = _checker(instruction, prompt)
    try:
        strict = _follows(instruction.id, checker, answer)
        loose = any(_follows(instruction.id, checker, variant) for variant in variants(answer))
    except Exception as error:  # a verifier may fail over an odd text, which is no verdict
        said = str(error) if isinstance(error, UnscorableError) else f"{type(error).__name__}: {error}"
        return Verdict(instruction.id, reason=" ".join(said.split())[:200])
    return Verdict(instruction.id, strict, loose)


def _follows(name: str, checker: Any, answer: str) -> bool:
    return bool(answer.strip()) and check(name, checker, answer)


def variants(answer: str) -> Iterator[str]:
    """The texts of which one has to follow an instruction loosely."""
    lines = answer.split("\n")
    cut = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    yield from cut
    yield from (text.replace("*", "") for text in cut)


def without_thinking(response: str) -> str:
    """The answer behind a thought; a response without one as it is, and of an unfinished thought nothing."""
    if "</think>" in response:
        return response.split("</think>", 1)[1].strip()
    return "" if response.lstrip().startswith("<think>") else response


def _checker(instruction: Instruction, prompt: str) -> tuple[Any, str]:
    """The verifier with the prompt's arguments, and what of them it did not take.

    What is missing or what a verifier refuses (such as the letter `#`) it draws at random, in the published
    evaluations too: here the same prompt always gets the same.
    """
    random.seed(xxhash.xxh32_intdigest(f"{instruction.id}/{prompt}".encode()))
    checker = registry(benchmark_of(instruction.id))[instruction.id](instruction.id)
    given = {key: value for key, value in instruction.kwargs.items() if value is not None}
    try:
        checker.build_description(**given)
    except (TypeError, ValueError) as error:
        raise UnscorableError(f"the kwargs of '{instruction.id}': {error}") from None
    used = checker.get_instruction_args() or {}
    if "prompt" in used:
        checker.build_description(prompt=prompt)
        used = {key: value for key, value in used.items() if key != "prompt"}
    return checker, not_taken(given, used)


def check_arguments(instruction: Instruction, prompt: str) -> str:
    """Nothing, or which argument the verifier draws at random instead of taking the one that is given.

    Raises:
        UnscorableError: unknown id, or arguments that are none of the verifier's.
    """
    return _checker(instruction, prompt)[1]


def unavailable(prompts: list[tuple[str, list[Instruction]]]) -> dict[str, str]:
    """Instructions that cannot be judged on this machine, with the reason, such as NLTK's data that is not there."""
    first: dict[str, tuple[Instruction, str]] = {}
    for prompt, instructions in prompts:
        for one in instructions:
            first.setdefault(one.id, (one, prompt))
    found = {name: _verdict(one, prompt, PROBE).reason for name, (one, prompt) in sorted(first.items())}
    return {name: reason for name, reason in found.items() if reason}
