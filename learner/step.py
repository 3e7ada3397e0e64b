"""One optimizer step on one rank: pack, count, run the rows, step once."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from uniapl.config import Config, LearnerConfig
from uniapl.objective.objective import rows_loss
from uniapl.objective.rows import TERMS, Block, block_tokens, count_tokens, make_rows, share_prompts
from uniapl.objective.sequences import TrainingSequence, training_sequences
from uniapl.packing import pack_balanced
from uniapl.records import MixedBatch


class NonFiniteError(RuntimeError):
    """The loss or the gradient of a batch is NaN or infinite: the run cannot go on from here."""


def train_step(engine: Any, batch: MixedBatch, config: Config, learning_rate: float, device: str) -> dict[str, float]:
    """Make one step on this rank's share of a batch. A collective: every rank must call it.

    Args:
        engine: the ZeRO-3 engine.
        batch: this rank's share; may be empty.
        learning_rate: of this step.

    Returns:
        metrics over the whole batch, the same on every rank.

    Raises:
        NonFiniteError: for the loss before the optimizer steps, for the gradient norm right after it.
    """
    began = time.monotonic()
    sequences = training_sequences(batch, config.objective, config.rollout.temperature)
    counts = _all_sum(count_tokens(sequences), device)
    batches = plan_micro_batches(sequences, config.learner, device)
    sums = _run_micro_batches(engine, batches, counts, config, device)
    sums["tokens/trained"] = float(sum(len(s) for s in sequences))
    totals = _reduce(sums, device)
    if not math.isfinite(totals["loss/total"]):
        ids = ", ".join(s.id for s in sequences[:8])
        raise NonFiniteError(f"step {batch.step}: the loss is {totals['loss/total']}; samples of this rank: {ids} ...")
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    engine.step()
    norm = engine.get_global_grad_norm()
    if norm is None or not math.isfinite(float(norm)):
        raise NonFiniteError(f"step {batch.step}: the gradient norm is {norm}")
    return _metrics(totals, config, learning_rate, float(norm), time.monotonic() - began)


MicroBatch = list[list[Block]]
"""The packed rows of one forward and backward pass."""


def plan_micro_batches(sequences: list[TrainingSequence], config: LearnerConfig, device: str) -> list[MicroBatch]:
    """Packed rows in micro-batches, as many on every rank: gathering a ZeRO-3 layer needs them all. At least one."""
    blocks = share_prompts(sequences, config.row_tokens, config.share_prompts)
    plan = pack_balanced([block_tokens(block) for block in blocks], config.row_tokens)
    rows = sorted(([blocks[i] for i in row] for row in plan), key=lambda row: -sum(map(block_tokens, row)))
    size = config.micro_batch_rows
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    number = torch.tensor([max(1, len(batches))], device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return batches + [[] for _ in range(int(number.item()) - len(batches))]


def _run_micro_batches(
    engine: Any, batches: list[MicroBatch], counts: Tensor, config: Config, device: str
) -> dict[str, float]:
    """Forward and backward of every micro-batch; gradients add up in the engine."""
    ranks = dist.get_world_size()
    sums: dict[str, float] = {}
    for micro_batch in batches:
        rows = make_rows(micro_batch).to(device)
        result = rows_loss(engine(rows), rows, counts, config.objective)
        # ZeRO averages gradients over ranks; the counts already span all of them.
        engine.backward(result.loss * ranks, scale_wrt_gas=False)
        more = {
            "loss/total": result.loss.item(),
            "tokens/rows": float(rows.input_ids.numel()),
            "tokens/computed": float(sum(block_tokens(block) for row in micro_batch for block in row)),
        }
        for key, value in (result.sums | more).items():
            sums[key] = sums.get(key, 0.0) + value
    return sums


def _all_sum(values: Tensor, device: str) -> Tensor:
    values = values.to(device)
    dist.all_reduce(values)
    return values


_REDUCED = (
    "loss/total",
    *(f"loss/{term}" for term in TERMS),
    "tokens/sampled",
    "tokens/demonstration",
    "tokens/trained",
    "tokens/rows",
    "tokens/computed",
    "sum/ratio",
    "sum/correction",
    "sum/clipped",
    "sum/kl",
    "sum/expert_nll",
)


def _reduce(sums: dict[str, float], device: str) -> dict[str, float]:
    """Sums over the ranks, every rank sending the same keys in the same order."""
    values = torch.tensor([sums.get(key, 0.0) for key in _REDUCED], dtype=torch.float64)
    return dict(zip(_REDUCED, _all_sum(values, device).tolist(), strict=True))


def _metrics(t: dict[str, float], config: Config, rate: float, norm: float, seconds: float) -> dict[str, float]:
    weights = config.objective.weights
    active = [term for term in TERMS if weights[term] > 0]
    sizes = {term: abs(weights[term] * t[f"loss/{term}"]) for term in active}
    whole = sum(sizes.values()) or 1.0
    found = {"loss/total": t["loss/total"], "learner/learning_rate": rate, "learner/grad_norm": norm}
    found |= {f"loss/{term}": t[f"loss/{term}"] for term in active}
    found |= {f"share/{term}": size / whole for term, size in sizes.items()}
    found |= {"tokens/trained": t["tokens/trained"], "tokens/computed": t["tokens/computed"]}
    found["learner/packing_efficiency"] = t["tokens/computed"] / t["tokens/rows"]
    found["tokens/trained_per_s"] = t["tokens/trained"] / seconds
    if t["tokens/sampled"]:
        n = t["tokens/sampled"]
        found |= {
            "ratio/mean": t["sum/ratio"] / n,
            "ratio/clip_fraction": t["sum/clipped"] / n,
            "correction/mean": t["sum/correction"] / n,
            "kl/behaviour": t["sum/kl"] / n,
        }
    if t["tokens/demonstration"]:
        found["expert/nll"] = t["sum/expert_nll"] / t["tokens/demonstration"]
    return found
