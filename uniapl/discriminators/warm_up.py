"""Preference pairs for the cotrained discriminator's first steps, before the adversarial term counts."""

from __future__ import annotations

from uniapl.config import Config
from uniapl.data.comparisons import ComparisonReader
from uniapl.data.encoding import ChatEncoder
from uniapl.data.errors import DataError
from uniapl.data.shuffle import permutation
from uniapl.data.sources import prompt_ids
from uniapl.records import Group, Prompt, Sample, Score

COMPARISON = -1
"""In the place of a lease: the group was never sampled."""
FIRST_PAIRS = 1000
"""Read before the start, at most."""


class WarmUp:
    """The pairs of `cotrained.comparisons`, as groups in which `chosen` is the expert's response, `rejected` a sample.

    A step has as many pairs as a batch has samples. Which ones these are depends on the seed and the step alone, so
    that a run which goes on needs no cursor: every epoch is another shuffle of all pairs.

    Raises:
        DataError: a file or the tokenizer cannot be used.
    """

    def __init__(self, config: Config) -> None:
        own = config.objective.adversarial.cotrained
        self._pairs = ComparisonReader(own.comparisons)
        self._encoder = ChatEncoder.from_folder(config.model.path)
        self._data, self._seed, self.steps = config.data, config.run.seed, own.warmup_steps
        self._per_step = max(1, config.queue.groups_per_step) * config.rollout.group_size

    def groups(self, step: int, rank: int = 0, ranks: int = 1) -> list[Group]:
        """The pairs of step `step` that are this rank's; none after the warm-up.

        Raises:
            DataError: a pair cannot be used, where bad rows are errors; else it is left out.
        """
        found = []
        for number in range(self._per_step)[rank::ranks] if step < self.steps else ():
            epoch, position = divmod(step * self._per_step + number, len(self._pairs))
            try:
                found.append(self._group(permutation(len(self._pairs), self._seed, "comparisons", epoch)(position)))
            except DataError:
                if self._data.on_bad_row == "error":
                    raise
        return found

    def _group(self, index: int) -> Group:
        pair = self._pairs[index]
        prompt = prompt_ids(pair, self._encoder, self._data.max_prompt_tokens)
        chosen, rejected = (
            self._encoder.response_ids(text)[: self._data.max_response_tokens] for text in (pair.chosen, pair.rejected)
        )
        sample = Sample(rejected, [], [], pair.rejected, "stop", Score(None, "a comparison"))
        return Group(COMPARISON, Prompt(pair.id, pair.messages, prompt, expert_ids=chosen), [sample], "")


def check_warm_up(config: Config) -> None:
    """Read the pairs of the first steps, as they will be: a bad one is found before anything starts.

    Raises:
        DataError: a file or a pair cannot be used.
    """
    warm_up = WarmUp(config)
    read = 0
    for step in range(min(warm_up.steps, config.run.steps)):
        if read >= FIRST_PAIRS:
            return
        read += len(warm_up.groups(step)) or FIRST_PAIRS
