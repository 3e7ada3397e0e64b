"""The cotrained discriminator over the learner's ranks: one ZeRO-3 engine more, beside the policy's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learner.checkpoint import load_engine, save_engine
from learner.device import Device
from learner.gradients import discard, gradient_norm
from learner.nonfinite import NonFiniteError, of_all_ranks
from learner.zero import build_engine
from uniapl.config import Config
from uniapl.discriminators.cotrained import (
    Duel,
    backbone_path,
    bradley_terry_loss,
    duel_batch,
    load_scorer,
    plan_duels,
)
from uniapl.discriminators.warm_up import COMPARISON, WarmUp
from uniapl.records import Group, Sample

TAG = "discriminator"
_SUMS = ("pairs", "loss", "told_apart", "expert", "sample")


class CotrainedDiscriminator:
    """Holds this rank's shard of the discriminator and its AdamW, at a constant learning rate of its own.

    Weight decay, betas, clipping and dtype are the policy's. Every method is a collective of all ranks.

    Args:
        config: of the run.
        device: of this rank.
        ranks: of the process group, which this process has joined.
    """

    def __init__(self, config: Config, device: Device, ranks: int) -> None:
        own = config.objective.adversarial.cotrained
        scorer = load_scorer(backbone_path(config), config.run.seed, config.learner.activation_checkpointing)
        learner = config.learner.model_copy(update={"learning_rate": own.learning_rate})
        self._engine = build_engine(scorer, learner, ranks, device)
        self._device = device.torch_device
        self._ranks = ranks
        self._warm_up = WarmUp(config) if own.comparisons else None
        self._has_gradient = False
        self._budget = config.learner.row_tokens * config.learner.micro_batch_rows

    def score(self, groups: list[Group], step: int) -> dict[str, float]:
        """Score every sample that has an expert's response beside it, and keep the gradient for `step` or `discard`.

        In the warm-up the gradient is of preference pairs too, where there are any: the mean is over all pairs alike.
        `expert_score` and `expert_reference` of each such sample are filled in place.

        Args:
            groups: this rank's share of the batch; may be empty.
            step: of the policy, for the error.

        Returns:
            metrics over the pairs of all ranks, the same on every rank; empty where no rank has any. Preference pairs
            have a loss and an accuracy of their own, and are not in the other ones.

        Raises:
            NonFiniteError: loss or gradient, with the prompts' ids; no gradient is left then.
        """
        if self._warm_up:
            groups = groups + self._warm_up.groups(step, dist.get_rank(), self._ranks)
        batches = plan_duels(groups, self._budget)
        pairs = sum(len(duel.samples) for batch in batches for duel in batch)
        total, most = self._reduce([pairs]), self._reduce([len(batches)], dist.ReduceOp.MAX)
        self._has_gradient = total[0] > 0
        if not self._has_gradient:
            return {}
        batches += [[] for _ in range(int(most[0]) - len(batches))]
        sums = torch.zeros(2, len(_SUMS), dtype=torch.float64)
        for batch in batches:
            sums += self._run(batch, total[0])
        reduced = self._reduce(sums.flatten().tolist())
        halves = reduced[: len(_SUMS)], reduced[len(_SUMS) :]
        sampled, compared = (dict(zip(_SUMS, half, strict=True)) for half in halves)
        metrics = _metrics(sampled) | _comparison_metrics(compared)
        norm = gradient_norm(self._engine)
        loss = (sampled["loss"] + compared["loss"]) / total[0]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.discard()
            raise _failure(step, loss, groups)
        return metrics | {"discriminator/grad_norm": norm}

    def step(self) -> None:
        """Make one optimizer step on what was scored; none where no rank had a pair."""
        if self._has_gradient:
            self._engine.step()
        self._has_gradient = False

    def discard(self) -> None:
        """Forget the gradient; weights and optimizer stay as they are."""
        discard(self._engine)
        self._has_gradient = False

    def save(self, folder: Path) -> None:
        """Shards of weights and optimizer, one file per rank, in `folder`/discriminator."""
        save_engine(self._engine, folder, TAG)

    def load(self, folder: Path, saved_by: int | None = None) -> None:
        """The inverse of `save`; `saved_by`, and other numbers of ranks: see `learner.checkpoint.load_engine`.

        Raises:
            RunError: there is nothing to load.
        """
        load_engine(self._engine, folder, TAG, saved_by)

    def _run(self, duels: list[Duel], pairs: float) -> Tensor:
        """Forward and backward of one micro-batch, its part of a mean over `pairs`; fills in the scores.

        Returns:
            [2, len(_SUMS)]: sums over pairs with a sample, and over preference pairs.
        """
        batch = duel_batch(duels).to(self._device)
        scores = self._engine(batch.input_ids, batch.attention_mask)
        expert, samples = scores[batch.expert_row], scores[batch.sample_row]
        losses = bradley_terry_loss(expert, samples)
        # ZeRO averages gradients over ranks; the pairs are those of all of them.
        self._engine.backward(losses.sum() / pairs * self._ranks, scale_wrt_gas=False)
        fought = [sample for duel in duels for sample in duel.samples]
        for sample, own, reference in zip(fought, samples.tolist(), expert.tolist(), strict=True):
            assert sample.score is not None  # noqa: S101 (the queue lets no unscored sample through)
            sample.score.expert_score, sample.score.expert_reference = own, reference
        values = _values(losses.detach(), expert.detach().double(), samples.detach().double())  # [_SUMS, P]
        compared = torch.tensor([duel.group.lease_id == COMPARISON for duel in duels for _ in duel.samples]).bool()
        return torch.stack([values[:, ~compared].sum(1), values[:, compared].sum(1)])

    def _reduce(self, values: list[float], operation: Any = dist.ReduceOp.SUM) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(reduced, op=operation)
        return reduced.tolist()


def _failure(step: int, loss: float, groups: list[Group]) -> NonFiniteError:
    """Names the prompts with a score that is not finite or, where only the gradient is not, all of them."""
    paired = [group for group in groups if group.prompt.expert_ids is not None]
    if math.isfinite(loss):
        everyone = of_all_ranks([group.prompt.id for group in paired])
        return NonFiniteError(step, "discriminator's gradient", everyone, "one or more of the prompts")
    bad = of_all_ranks([group.prompt.id for group in paired if not all(map(_finite, group.samples))])
    return NonFiniteError(step, "discriminator's loss", bad, "prompts")


def _finite(sample: Sample) -> bool:
    score = sample.score
    return score is None or all(math.isfinite(value or 0.0) for value in (score.expert_score, score.expert_reference))


def _values(losses: Tensor, expert: Tensor, samples: Tensor) -> Tensor:
    """What `_SUMS` names of every pair, [_SUMS, P], on the CPU."""
    told_apart = (samples < expert).double()
    return torch.stack([torch.ones_like(losses), losses, told_apart, expert, samples]).cpu()


def _comparison_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means over preference pairs; empty without any."""
    n = sums["pairs"]
    if not n:
        return {}
    return {
        "discriminator/comparisons": n,
        "discriminator/comparison_loss": sums["loss"] / n,
        "discriminator/comparison_accuracy": sums["told_apart"] / n,
    }


def _metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means over pairs with a sample, as in `uniapl.metrics`; empty without any."""
    n = sums["pairs"]
    if not n:
        return {}
    expert, sample = sums["expert"] / n, sums["sample"] / n
    return {
        "discriminator/loss": sums["loss"] / n,
        "discriminator/accuracy": sums["told_apart"] / n,
        "discriminator/margin": expert - sample,
        "discriminator/sample_mean": sample,
        "discriminator/expert_mean": expert,
        "discriminator/gap": expert - sample,
    }
