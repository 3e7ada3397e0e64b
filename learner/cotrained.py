"""The cotrained discriminator over the learner's ranks: one ZeRO-3 engine more, beside the policy's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_grad
from torch import Tensor

from learner.device import Device
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
from uniapl.records import Group

TAG = "discriminator"
NAMED_PROMPTS = 8
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
        self._engine = build_engine(scorer, learner, ranks)
        self._device = device.torch_device
        self._ranks = ranks
        self._budget = config.learner.row_tokens * config.learner.micro_batch_rows

    def score_and_train(self, groups: list[Group]) -> dict[str, float]:
        """Score every sample that has an expert's response beside it, then make one optimizer step.

        Scores are those of the weights before the step: `expert_score` and `expert_reference` of each such
        sample are filled in place.

        Args:
            groups: this rank's share of the batch; may be empty.

        Returns:
            metrics over the pairs of all ranks, the same on every rank; empty where no rank has any.

        Raises:
            RuntimeError: the loss or the gradient is not finite; before the step, naming the prompts.
        """
        batches = plan_duels(groups, self._budget)
        pairs = sum(len(duel.samples) for batch in batches for duel in batch)
        total, most = self._reduce([pairs]), self._reduce([len(batches)], dist.ReduceOp.MAX)
        if not total[0]:
            return {}
        batches += [[] for _ in range(int(most[0]) - len(batches))]
        sums = dict.fromkeys(_SUMS, 0.0)
        for batch in batches:
            for key, value in self._run(batch, total[0]).items():
                sums[key] += value
        metrics = _metrics(dict(zip(_SUMS, self._reduce(list(sums.values())), strict=True)))
        self._require_finite(metrics["discriminator/loss"], "loss", groups)
        metrics["discriminator/grad_norm"] = self._gradient_norm()
        self._require_finite(metrics["discriminator/grad_norm"], "gradient norm", groups)
        self._engine.step()
        return metrics

    def save(self, folder: Path) -> None:
        """Shards of weights and optimizer, one file per rank, in `folder`/discriminator."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """The inverse of `save`, with the same number of ranks.

        Raises:
            RuntimeError: there is nothing to load.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
        if path is None:
            raise RuntimeError(f"{folder}: holds no state of a discriminator")

    def _run(self, duels: list[Duel], pairs: float) -> dict[str, float]:
        """Forward and backward of one micro-batch, its part of a mean over `pairs`; fills in the scores."""
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
        return _sums(losses.detach(), expert.detach().double(), samples.detach().double())

    def _gradient_norm(self) -> float:
        squares = [safe_get_local_grad(p).double().square().sum() for p in self._engine.module.parameters()]
        return math.sqrt(self._reduce([float(torch.stack(squares).sum())])[0])

    def _require_finite(self, value: float, what: str, groups: list[Group]) -> None:
        if math.isfinite(value):
            return
        paired = [group for group in groups if group.prompt.expert_ids is not None]
        bad = [group for group in paired if not all(map(_finite, group.samples))]
        mine = [group.prompt.id for group in (bad if what == "loss" else paired)]
        found: list[Any] = [None] * self._ranks
        dist.all_gather_object(found, mine)  # any rank's error may be the one that is shown
        ids = [name for names in found for name in names]
        more = f" and {len(ids) - NAMED_PROMPTS} more" if len(ids) > NAMED_PROMPTS else ""
        raise RuntimeError(f"the discriminator's {what} is {value}; prompts: {', '.join(ids[:NAMED_PROMPTS])}{more}")

    def _reduce(self, values: list[float], operation: Any = dist.ReduceOp.SUM) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(reduced, op=operation)
        return reduced.tolist()


def _finite(sample: Any) -> bool:
    return math.isfinite(sample.score.expert_score) and math.isfinite(sample.score.expert_reference)


def _sums(losses: Tensor, expert: Tensor, samples: Tensor) -> dict[str, float]:
    told_apart = (samples < expert).double()
    values = [torch.ones_like(losses), losses, told_apart, expert, samples]
    return {key: float(value.sum()) for key, value in zip(_SUMS, values, strict=True)}


def _metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means over pairs; as in `uniapl.metrics`."""
    n = sums["pairs"]
    expert, sample = sums["expert"] / n, sums["sample"] / n
    return {
        "discriminator/loss": sums["loss"] / n,
        "discriminator/accuracy": sums["told_apart"] / n,
        "discriminator/margin": expert - sample,
        "discriminator/sample_mean": sample,
        "discriminator/expert_mean": expert,
        "discriminator/gap": expert - sample,
    }
