"""All learner ranks as one object, for the driver."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import ray

from learner.nonfinite import NonFiniteError
from learner.worker import LearnerRank, Scores
from learner.zero_files import TAG, UNIVERSAL, ranks_in
from uniapl.broadcast_result import BroadcastError, Sent
from uniapl.config import Config
from uniapl.objective.sequences import TrainingSequence
from uniapl.records import Demonstration, Group
from uniapl.shares import share_out


class LearnerGroup:
    """Starts the ranks and calls them together; an error of any rank is raised here.

    Args:
        config: of the run.
        options: Ray options of one rank (resources, environment).
    """

    def __init__(self, config: Config, options: dict[str, Any]) -> None:
        self._config = config
        actor = ray.remote(LearnerRank)
        self.ranks = [actor.options(**options).remote(rank, config) for rank in range(config.learner.ranks)]

    @cached_property
    def nodes(self) -> list[str]:
        """The id of every rank's node."""
        return self._all([rank.node.remote() for rank in self.ranks])

    def check_paths(self) -> list[Any]:
        """References that fail with RunError where a rank's node does not see the run's folder or the model."""
        return [rank.check_paths.remote() for rank in self.ranks]

    def start(self) -> list[Any]:
        """Begin loading; the references are done when every rank is ready."""
        timeout = self._config.cluster.start_timeout_s
        host, port = ray.get(self.ranks[0].address.remote(), timeout=timeout)
        return [rank.start.remote(host, port) for rank in self.ranks]

    def step(
        self,
        number: int,
        groups: list[Group],
        tokens: list[int],
        demonstrations: list[Demonstration],
        weights: dict[str, float],
    ) -> tuple[dict[str, float], Scores]:
        """The optimizer steps of one batch, shared out so that every rank has about as many tokens.

        Args:
            number: of the step, from 0.
            groups: of the batch.
            tokens: of each group.
            demonstrations: of the batch.
            weights: of every term in this step.

        Returns:
            metrics, and the expert scores of a cotrained discriminator by lease; without one empty.

        Raises:
            NonFiniteError: loss or gradient, of the policy or of a cotrained discriminator; both are as they were, the
                policy but for the batch's earlier steps.
        """
        shares = share_out(groups, tokens, demonstrations, len(self.ranks))
        calls = [rank.step.remote(number, *share, weights) for rank, share in zip(self.ranks, shares, strict=True)]
        try:
            answers = self._all(calls)
        except NonFiniteError as error:  # every rank raises the same one; without Ray's wrapping and its traceback
            raise getattr(error, "cause", error) from None
        return answers[0][0], {lease: found for _, scores in answers for lease, found in scores.items()}

    def logprobs(self, sequences: list[TrainingSequence]) -> list[list[float]]:
        """Log-probabilities of the response tokens under the present weights."""
        return self._all([rank.logprobs.remote(sequences) for rank in self.ranks])[0]

    def connect(self, engines: list[Any]) -> Sent:
        """Form the weight group with these rollout actors, instead of those it had.

        Never raises because of an engine: see `broadcast`.

        Raises:
            BroadcastError: no engine is at fault, and the group was not formed.
        """
        return self._sent([rank.connect.remote(engines) for rank in self.ranks])

    def broadcast(self, version: int, vector_scale: float = 1.0) -> Sent:
        """Send the present weights to every connected engine and wait for their acknowledgements.

        An engine that dies, misses `cluster.broadcast_timeout_s` in a phase or acknowledges other weights is cut
        off and named in the result; the others get the weights again, in a group without it.

        Raises:
            BroadcastError: no engine is at fault, the learner's ranks were too late themselves.
        """
        return self._sent([rank.broadcast.remote(version, vector_scale) for rank in self.ranks])

    def _sent(self, calls: list[Any]) -> Sent:
        try:
            return self._all(calls)[0]
        except BroadcastError as error:  # without Ray's wrapping and its traceback
            raise getattr(error, "cause", error) from None

    def save(self, folder: Path) -> None:
        self._all([rank.save.remote(str(folder.absolute())) for rank in self.ranks])

    def load(self, folder: Path, saved_by: int | None = None, told: Callable[[str], None] = print) -> None:
        """Load what `save` wrote; if another number of ranks wrote it, by way of a universal checkpoint beside it.

        Args:
            folder: of the checkpoint.
            saved_by: the number of ranks that wrote it, where each rank's node has a copy of what its ranks need;
                None: all see the same folder.
            told: called with a line about what may take long.

        Raises:
            RunError: there is nothing to load, or not all of it, or no room beside it.
        """
        there = str(folder.absolute())
        ranks = saved_by or ranks_in(folder / TAG)
        if ranks in (0, len(self.ranks)):  # 0: the ranks say what is missing
            self._all([rank.load.remote(there, saved_by) for rank in self.ranks])
            return
        told(f"{folder.name} was saved by {ranks} learner ranks: DeepSpeed's universal checkpoint is made of it")
        place = there + UNIVERSAL
        chosen = [self.ranks[i] for i in self._firsts(each_node=saved_by is not None)]
        self._all([rank.write_universal.remote(there, place) for rank in chosen], bounded=False)
        self._all([rank.load.remote(place, None) for rank in self.ranks])
        self._all([rank.remove_universal.remote(place) for rank in chosen])

    def _firsts(self, each_node: bool) -> list[int]:
        """The first rank, of all or of each node."""
        return sorted({self.nodes.index(node) for node in self.nodes}) if each_node else [0]

    def export(self, folder: Path, card: str) -> None:
        """The policy as a Hugging Face folder with `card` as its README.md."""
        self._all([rank.export.remote(str(folder.absolute()), card) for rank in self.ranks])

    def _all(self, calls: list[Any], bounded: bool = True) -> list[Any]:
        """The answers of all ranks, or the first error of any: the others may then wait for it for ever.

        Not `bounded`: what takes its time by the size of the model, and waits for nobody.
        """
        pending, timeout = list(calls), self._config.cluster.step_timeout_s if bounded else None
        while pending:
            done, pending = ray.wait(pending, timeout=timeout)
            if not done:
                raise TimeoutError(
                    f"{len(pending)} learner ranks gave no answer within {timeout:g} s (cluster.step_timeout_s)"
                )
            ray.get(done)
        return ray.get(calls)
