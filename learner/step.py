"""One optimizer step on one rank: pack, count, run the rows, check, step once."""

from __future__ import annotations

import math
import time
from typing import Any

import torch.distributed as dist
from torch import Tensor

from learner.diagnostics import run_term_by_term
from learner.gradients import discard, gradient_norm
from learner.nonfinite import NonFiniteError, of_all_ranks
from learner.passes import MicroBatch, Passes, Tally, plan_micro_batches, sequences_of
from learner.statistics import gathered, importance_metrics, over_ranks, step_metrics
from uniapl.config import Config, LearnerConfig
from uniapl.objective.rows import count_terms
from uniapl.objective.sequences import TrainingSequence, training_sequences
from uniapl.records import MixedBatch


def train_step(
    engine: Any,
    batch: MixedBatch,
    config: Config,
    weights: dict[str, float],
    learning_rate: float,
    device: str,
    reference: Any | None = None,
    update: bool = True,
) -> dict[str, float]:
    """Make one step on this rank's share of a batch. A collective: every rank must call it.

    Args:
        engine: the ZeRO-3 engine.
        batch: this rank's share; may be empty.
        config: of the run.
        weights: of every term in this step.
        learning_rate: of this step.
        device: of this rank.
        reference: the engine around the frozen reference policy; needed while the term `kl` is active.
        update: False leaves weights and optimizer as they are: loss and gradient are measured alone.

    Returns:
        metrics over the whole batch, the same on every rank.

    Raises:
        NonFiniteError: loss or gradient; no rank has changed its weights or its optimizer's state then.
    """
    began = time.monotonic()
    objective = config.objective
    sequences = training_sequences(batch, objective, config.rollout.temperature, weights, config.rollout.max_tokens)
    counts = all_sum(count_terms(sequences), device)
    passes = Passes(engine, reference if objective.active("kl", weights) else None, objective, counts, weights, device)
    tally = Tally(sums={"tokens/trained": float(sum(len(s) for s in sequences))})
    diagnosed = objective.diagnostics_every > 0 and batch.step % objective.diagnostics_every == 0
    gradients = _accumulate(passes, sequences, config.learner, tally, diagnosed)
    totals = over_ranks(tally.sums, device)
    norm = gradient_norm(engine)
    if not (math.isfinite(totals["loss/total"]) and math.isfinite(norm)):
        raise _failure(passes, sequences, config.learner, batch.step, totals["loss/total"], tally.bad)
    if update:
        _update(engine, learning_rate, batch.step, norm)
    else:
        discard(engine)
    metrics = step_metrics(totals, counts, weights) | gradients
    metrics |= importance_metrics(gathered(tally.log_ratios, device))
    metrics |= {"learner/learning_rate": learning_rate, "learner/grad_norm": norm}
    metrics["tokens/trained_per_s"] = metrics["tokens/trained"] / (time.monotonic() - began)
    return metrics


def _update(engine: Any, learning_rate: float, step: int, norm: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    engine.step()
    if not engine.was_step_applied():
        raise RuntimeError(f"step {step}: DeepSpeed refused a gradient of norm {norm}")


def all_sum(values: Tensor, device: str) -> Tensor:
    """The sum over the ranks. A collective."""
    values = values.to(device)
    dist.all_reduce(values)
    return values


def _accumulate(
    passes: Passes, sequences: list[TrainingSequence], config: LearnerConfig, tally: Tally, diagnosed: bool
) -> dict[str, float]:
    """Bring the whole gradient into the engine; returns what the diagnostics found of it."""
    if diagnosed:
        return run_term_by_term(passes, sequences, config, tally)
    passes.run(plan_micro_batches(sequences, config, passes.device), tally)
    return {}


def _failure(
    passes: Passes, sequences: list[TrainingSequence], config: LearnerConfig, step: int, loss: float, bad: list[str]
) -> NonFiniteError:
    """Find out whose fault it is, and leave no gradient behind."""
    what = "gradient" if math.isfinite(loss) else "loss"
    ids, found_in = of_all_ranks(bad), "samples"
    if not ids:
        batches = plan_micro_batches(sequences, config, passes.device)
        ids, found_in = of_all_ranks(_in_bad_micro_batches(passes, batches)), "one or more of the samples"
    if not ids:
        ids, found_in = of_all_ranks([s.id for s in sequences]), "no single micro-batch shows it; samples of the batch"
    discard(passes.engine)
    return NonFiniteError(step, what, ids, found_in)


def _in_bad_micro_batches(passes: Passes, batches: list[MicroBatch]) -> list[str]:
    """Ids of this rank's sequences in the micro-batches that alone have a loss or gradient that is not finite."""
    found: list[str] = []
    for micro_batch in batches:
        discard(passes.engine)
        alone = Tally()
        passes.run([micro_batch], alone)
        loss = over_ranks(alone.sums, passes.device)["loss/total"]
        if not (math.isfinite(loss) and math.isfinite(gradient_norm(passes.engine))):
            found += [s.id for s in sequences_of(micro_batch)]
    return found
