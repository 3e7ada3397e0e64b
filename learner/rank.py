"""One ZeRO-3 rank: its engines and what they are asked for. Imported by the rank's own process alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
import xxhash

from learner import checkpoint
from learner.cotrained import CotrainedDiscriminator
from learner.device import give_back_memory, local_device, set_threads
from learner.export import DTYPES
from learner.nonfinite import NonFiniteError
from learner.passes import plan_micro_batches
from learner.step import train_step
from learner.weight_sender import WeightSender
from learner.weight_source import ZeroSource
from learner.worker import Scores
from learner.zero import build_engine, build_reference, join_ranks
from uniapl.broadcast_result import Sent
from uniapl.config import Config
from uniapl.objective.rows import make_rows
from uniapl.objective.sequences import TrainingSequence
from uniapl.policy import load_policy
from uniapl.records import Demonstration, Group, MixedBatch, expert_scores, put_expert_scores
from uniapl.schedule import learning_rate


class Rank:
    """Holds this rank's shard of the policy and its optimizer. Every method is a collective.

    Args:
        rank: of this process in the group that the environment names.
        config: of the run.
    """

    def __init__(self, rank: int, config: Config) -> None:
        self._device = local_device(0, config.learner.dtype)
        self._rank, ranks = rank, config.learner.ranks
        set_threads(config.learner.threads, ranks)
        join_ranks(self._device, config.cluster.step_timeout_s)
        policy = load_policy(config.model.path, config.learner.activation_checkpointing, self._device.attention)
        self._engine = build_engine(policy, config.learner, ranks, self._device)
        self._reference, self._reference_path = None, ""
        self.use(config)
        c = self._config
        self._discriminator = CotrainedDiscriminator(c, self._device, ranks) if c.objective.cotrained else None
        source = ZeroSource(self._engine.module, DTYPES[c.rollout.dtype])
        transport = "gloo" if c.rollout.colocate else self._device.backend
        self._sender = WeightSender(source, self._device, self._rank, c.cluster.broadcast_timeout_s, transport)

    def use(self, config: Config) -> None:
        """Take steps with these values from now on; what the engines were built with stays as it is."""
        if not self._device.shares_prompts:
            unshared = config.learner.model_copy(update={"share_prompts": False})
            config = config.model_copy(update={"learner": unshared})
        self._config = config
        self._engine.optimizer.clip_grad = config.learner.max_grad_norm
        path = config.objective.kl.reference or config.model.path  # what training began from, also after a resume
        if config.objective.kl.weight.ever_positive and path != self._reference_path:
            frozen = load_policy(path, attention=self._device.attention)
            self._reference = build_reference(frozen, config.learner, config.learner.ranks, self._device)
            self._reference_path = path

    def step(
        self,
        number: int,
        groups: list[Group],
        demonstrations: list[Demonstration],
        weights: dict[str, float],
        update: bool = True,
        scored: bool = False,
    ) -> tuple[dict[str, float], Scores]:
        """The optimizer steps of one batch on this rank's share, then that of a cotrained discriminator.

        Args:
            number: of the step, from 0.
            groups: this rank's.
            demonstrations: this rank's.
            weights: of every term in this step.
            update: False measures loss and gradient alone, and leaves weights and optimizers as they are.
            scored: the groups hold the expert scores to use, also where a discriminator is cotrained.

        Returns:
            metrics over all ranks, and the expert scores that a cotrained discriminator gave this rank's groups.
        """
        c = self._config
        # Dropout, in a model that has any, depends on seed, step and rank alone: no generator's state to be saved.
        torch.manual_seed(xxhash.xxh32_intdigest(f"{c.run.seed}/{number}/{self._rank}".encode()))
        batch = MixedBatch(number, groups, demonstrations)
        rate = learning_rate(number, c.run.steps, c.learner)
        learned, known = {}, expert_scores(groups)
        if self._discriminator:
            learned = self._discriminator.score(groups, number)
            if scored:
                put_expert_scores(groups, known)
        try:
            learned |= train_step(
                self._engine, batch, c, weights, rate, self._device.torch_device, self._reference, update
            )
        except NonFiniteError as error:
            if self._discriminator:
                self._discriminator.discard()
                error.scores = _of_all_ranks(expert_scores(groups))
            raise
        if self._discriminator:
            self._discriminator.step() if update else self._discriminator.discard()
        if c.rollout.colocate:
            give_back_memory()
        return learned, expert_scores(groups) if self._discriminator else {}

    @torch.no_grad()
    def logprobs(self, sequences: list[TrainingSequence]) -> list[list[float]]:
        """Log-probabilities of the response tokens, one list per sequence. Every rank gets the same sequences."""
        order = {id(s): i for i, s in enumerate(sequences)}
        found: list[list[float]] = [[] for _ in sequences]
        device = self._device.torch_device
        wanted = [s for s in sequences if s.response_ids]
        for micro_batch in plan_micro_batches(wanted, self._config.learner, device):
            values = self._engine(make_rows(micro_batch).to(device)).tolist()
            for sequence in (s for row in micro_batch for block in row for s in block):
                length = len(sequence.response_ids)
                found[order[id(sequence)]], values = values[:length], values[length:]
        return found

    def connect(self, handles: list[Any]) -> Sent:
        """Form the weight group with the engines behind `handles`."""
        return self._sender.connect(handles, self._config.rollout.tensor_parallel, ray.util.get_node_ip_address())

    def broadcast(self, version: int, vector_scale: float) -> Sent:
        """Send the present weights to the engines as `version`; see `WeightSender.send`."""
        return self._sender.send(version, vector_scale)

    def save(self, folder: str) -> None:
        """Write this rank's part of a checkpoint into `folder`."""
        checkpoint.save_engine(self._engine, Path(folder))
        if self._discriminator:
            self._discriminator.save(Path(folder))

    def load(self, folder: str, saved_by: int | None = None) -> None:
        """Read this rank's part of a checkpoint from `folder`; `saved_by`: see `checkpoint.load_engine`."""
        checkpoint.load_engine(self._engine, Path(folder), saved_by=saved_by)
        if self._discriminator:
            self._discriminator.load(Path(folder), saved_by)

    def export(self, folder: str, card: str) -> None:
        """Write the whole policy as a Hugging Face folder with `card` as its README.md, from rank 0."""
        checkpoint.export_model(self._engine, self._config.model.path, Path(folder), self._rank, card)


def _of_all_ranks(mine: Scores) -> Scores:
    """A collective."""
    everyone: list[Scores] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {lease: found for scores in everyone for lease, found in scores.items()}
