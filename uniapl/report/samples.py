"""Which held-out samples the report shows side by side."""

from __future__ import annotations

from dataclasses import dataclass

from uniapl.analysis import EvaluatedSample, Evaluation

PER_KIND = 3
MAX_CHARACTERS = 2000
KINDS = ("newly passed", "no longer passed", "failed both times", "passed both times", "without a pair")


@dataclass(frozen=True)
class Pair:
    """A prompt's first sample before and after training; either may be missing."""

    kind: str
    before: EvaluatedSample | None
    after: EvaluatedSample | None

    @property
    def either(self) -> EvaluatedSample:
        found = self.after or self.before
        assert found is not None  # noqa: S101 (pairs are made of at least one)
        return found

    @property
    def checks(self) -> list[tuple[str, bool | None, bool | None]]:
        """(name, outcome before, outcome after) of each check; None where it was not made."""
        old, new = (sample.checks if sample else {} for sample in (self.before, self.after))
        return [(name, old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys())]


def paired_samples(before: Evaluation | None, after: Evaluation | None) -> list[Pair]:
    """Each prompt's first samples, in the order of the evaluation."""
    old, new = (_first_samples(evaluation) for evaluation in (before, after))
    return [_pair(old.get(prompt), new.get(prompt)) for prompt in old | new]


def choose(pairs: list[Pair]) -> list[tuple[str, int, list[Pair]]]:
    """(kind, prompts of that kind, the first few of them): every outcome is shown, not the best ones."""
    groups = [(kind, [pair for pair in pairs if pair.kind == kind]) for kind in KINDS]
    return [(kind, len(found), found[:PER_KIND]) for kind, found in groups if found]


def shown(text: str) -> str:
    """`text` cut to a readable length."""
    rest = len(text) - MAX_CHARACTERS
    return f"{text[:MAX_CHARACTERS]}\n[… {rest:,} more characters]" if rest > 0 else text


def _first_samples(evaluation: Evaluation | None) -> dict[str, EvaluatedSample]:
    first: dict[str, EvaluatedSample] = {}
    for sample in evaluation.samples if evaluation else []:
        first.setdefault(sample.prompt_id, sample)
    return first


def _pair(before: EvaluatedSample | None, after: EvaluatedSample | None) -> Pair:
    old, new = (sample.passed if sample else None for sample in (before, after))
    if old is None or new is None:
        return Pair(KINDS[4], before, after)
    kinds = {(False, True): KINDS[0], (True, False): KINDS[1], (False, False): KINDS[2], (True, True): KINDS[3]}
    return Pair(kinds[old, new], before, after)
