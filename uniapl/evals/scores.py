"""Verdicts added up: rates at the levels of prompts and of instructions, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from uniapl.analysis import Interval, wilson_interval
from uniapl.evals.verdicts import Verdict


@dataclass(frozen=True)
class Answer:
    """One sampled response with its verdicts or, where rewards judge, with its reward and their checks.

    `logprob`: of the whole response under the distribution that was sampled from; greedy: under the model's own.
    """

    text: str
    tokens: int
    finish_reason: str
    logprob: float = 0.0
    verdicts: list[Verdict] = field(default_factory=list)
    reward: float | None = None
    checks: dict[str, bool] = field(default_factory=dict)
    unscored: str = ""

    def passed(self, loose: bool = False) -> bool | None:
        """All of the prompt's instructions, or the rewards' checks; None where one of them cannot be told."""
        if not self.verdicts:
            if self.reward is None:
                return None
            return all(self.checks.values()) if self.checks else self.reward >= 1.0
        outcomes = [verdict.loose if loose else verdict.strict for verdict in self.verdicts]
        return None if None in outcomes else all(outcomes)


Answers = Sequence[Sequence[Answer]]
"""[prompts][samples]"""


def scores(answers: Answers) -> dict[str, Interval]:
    """The rates of a suite, each with its 95 % interval; those that nothing counts for are left out.

    With instructions: `prompt_strict`, `prompt_loose`, `instruction_strict`, `instruction_loose`; with rewards
    `pass`. With several samples to a prompt each is a mean over them, and `..._any` at the prompt level says for how
    many prompts at least one sample passed.
    """
    judged = any(answer.verdicts for group in answers for answer in group)
    several = max((len(group) for group in answers), default=0) > 1
    found: dict[str, Interval | None] = {}
    for name, loose in (("strict", False), ("loose", True)) if judged else (("", False),):
        level = f"prompt_{name}" if judged else "pass"
        outcomes = [[answer.passed(loose) for answer in group] for group in answers]
        found[level] = rate(outcomes)
        if several:
            found[f"{level}_any"] = rate([_any(group) for group in outcomes])
        if judged:
            found[f"instruction_{name}"] = rate([_instructions(group, loose) for group in answers])
    return {name: interval for name, interval in found.items() if interval is not None}


def by_instruction(answers: Answers) -> dict[str, tuple[Interval, Interval | None]]:
    """Strict and loose rate of each instruction; where rewards judge, of each of their checks, without a loose one."""
    strict: dict[str, list[list[bool | None]]] = {}
    loose: dict[str, list[list[bool | None]]] = {}
    for group in answers:
        own: dict[str, tuple[list[bool | None], list[bool | None]]] = {}
        for answer in group:
            for verdict in answer.verdicts:
                place = own.setdefault(verdict.instruction, ([], []))
                place[0].append(verdict.strict)
                place[1].append(verdict.loose)
            for name, passed in answer.checks.items() if answer.reward is not None else ():
                own.setdefault(name, ([], []))[0].append(passed)
        for name, (one, other) in own.items():
            strict.setdefault(name, []).append(one)
            loose.setdefault(name, []).append(other)
    rates = {name: rate(outcomes) for name, outcomes in sorted(strict.items())}
    return {name: (found, rate(loose[name])) for name, found in rates.items() if found is not None}


def rate(clusters: Sequence[Sequence[bool | None]]) -> Interval | None:
    """The share of outcomes that are true, with a 95 % interval that knows that those of one prompt go together.

    Wilson's interval for the effective number of outcomes: as many independent ones as would have the variance that
    the prompts' sums show (Korn and Graubard 1998, Survey Methodology 24). With one outcome to a prompt that is the
    number of prompts. Where all outcomes are the same, nothing is known of how they go together, and the prompts count.

    Args:
        clusters: outcomes by prompt; None: not known, and not counted.

    Returns:
        the interval, whose `count` is the number of prompts with an outcome; None where there is none.
    """
    known = [[outcome for outcome in cluster if outcome is not None] for cluster in clusters]
    known = [cluster for cluster in known if cluster]
    total, prompts = sum(map(len, known)), len(known)
    if not total:
        return None
    share = sum(map(sum, known)) / total
    spread = sum((sum(cluster) - share * len(cluster)) ** 2 for cluster in known)
    effective = float(prompts)
    if spread > 0 and prompts > 1:
        variance = spread / total**2 * prompts / (prompts - 1)
        effective = min(share * (1 - share) / variance * prompts / (prompts - 1), float(total))
    found = wilson_interval(share, math.floor(effective + 1e-9) or 1)
    return Interval(found.value, found.low, found.high, prompts)


def _any(group: Sequence[bool | None]) -> list[bool | None]:
    """Whether one of a prompt's samples passed; unknown where one is unknown."""
    return [None if None in group else any(group)] if group else []


def _instructions(group: Sequence[Answer], loose: bool) -> list[bool | None]:
    return [verdict.loose if loose else verdict.strict for answer in group for verdict in answer.verdicts]
