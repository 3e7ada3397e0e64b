"""The optimizer steps of one batch on one rank: pack, count, then run the rows, check and step."""

from __future__ import annotations

import math
import time
from statistics import fmean
from typing import Any

import torch.distributed as dist
from torch import Tensor

from learner.diagnostics import run_term_by_term
from learner.gradients import discard, gradient_norm
from learner.nonfinite import NonFiniteError, of_all_ranks
from learner.passes import MicroBatch, Passes, Tally, plan_micro_batches, sequences_of
from learner.statistics import checked_loss, gathered, importance_metrics, over_ranks, step_metrics
from uniapl.config import Config, LearnerConfig
from uniapl.objective.rows import count_terms
from uniapl.objective.sequences import TrainingSequence, training_sequences
from uniapl.records import MixedBatch

CLIPPED = ("ratio/clip_fraction", "ratio/clip_fraction_adversarial")


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
    """Make `learner.steps_per_batch` optimizer steps on this rank's share of a batch. A collective of all ranks.

    Every step runs the whole batch. The surrogate's proximal policy is the one before the first step, so that from the
    second on its ratio is no longer 1 and its clip binds.

    Args:
        engine: the ZeRO-3 engine.
        batch: this rank's share; may be empty.
        config: of the run.
        weights: of every term in this step.
        learning_rate: of each of these steps.
        device: of this rank.
        reference: the engine around the frozen reference policy; needed while the term `kl` is active.
        update: False leaves weights and optimizer as they are: loss and gradient of the first step are measured alone.

    Returns:
        metrics over the whole batch, the same on every rank, as of the first step; fractions that the clip decides are
        means over the steps.

    Raises:
        NonFiniteError: loss or gradient of a step; no rank has changed its weights or its optimizer's state in it.
    """
    began = time.monotonic()
    objective, steps = config.objective, config.learner.steps_per_batch if update else 1
    sequences = training_sequences(batch, objective, config.rollout.temperature, weights, config.rollout.max_tokens)
    counts = all_sum(count_terms(sequences), device)
    reference = reference if objective.active("kl", weights) else None
    start: dict[int, Tensor] | None = {} if steps > 1 else None
    passes = Passes(engine, reference, objective, counts, weights, device, start)
    found = []
    for number in range(steps):
        diagnosed = number == 0 and objective.diagnostics_every > 0 and batch.step % objective.diagnostics_every == 0
        where = f" in step {number + 1} of {steps} on the batch" if number else ""
        found.append(_measure(passes, sequences, config.learner, diagnosed, batch.step, where))
        if update:
            _update(passes, sequences, learning_rate, batch.step, where)
        else:
            discard(engine)
    metrics = found[0] | {key: fmean(one[key] for one in found) for key in CLIPPED if key in found[0]}
    metrics |= {"learner/learning_rate": learning_rate}
    metrics["tokens/trained_per_s"] = steps * metrics["tokens/trained"] / (time.monotonic() - began)
    return metrics


def _measure(
    passes: Passes, sequences: list[TrainingSequence], config: LearnerConfig, diagnosed: bool, step: int, where: str
) -> dict[str, float]:
    """Bring the gradient of the whole batch into the engine, and check it; returns the metrics.

    Args:
        diagnosed: also measure every term's own gradient.
        step: of the batch, for the error.
        where: after what is not finite, for the error.
    """
    tally = Tally(sums={"tokens/trained": float(sum(len(s) for s in sequences))})
    gradients = _accumulate(passes, sequences, config, tally, diagnosed)
    totals = over_ranks(tally.sums, passes.device)
    norm = gradient_norm(passes.engine)
    loss = checked_loss(totals)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise _failure(passes, sequences, config, step, loss, tally.bad, where)
    metrics = step_metrics(totals, passes.counts, passes.weights) | gradients
    metrics |= importance_metrics(gathered(tally.log_ratios, passes.device))
    return metrics | {"learner/grad_norm": norm}


def _update(passes: Passes, sequences: list[TrainingSequence], learning_rate: float, step: int, where: str) -> None:
    engine = passes.engine
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    engine.step()
    if not engine.was_step_applied():  # on all ranks: they have agreed on it
        discard(engine)
        ids = of_all_ranks([s.id for s in sequences])
        raise NonFiniteError(step, f"gradient that DeepSpeed refused{where}", ids, "samples of the batch")


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
    passes: Passes,
    sequences: list[TrainingSequence],
    config: LearnerConfig,
    step: int,
    loss: float,
    bad: list[str],
    where: str,
) -> NonFiniteError:
    """Find out whose fault it is, and leave no gradient behind."""
    what = ("gradient" if math.isfinite(loss) else "loss") + where
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
        loss = checked_loss(over_ranks(alone.sums, passes.device))
        if not (math.isfinite(loss) and math.isfinite(gradient_norm(passes.engine))):
            found += [s.id for s in sequences_of(micro_batch)]
    return found
