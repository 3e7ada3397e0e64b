"""One step of the training loop: a mixed batch in, an optimizer step, weights back to the engines, and its metrics."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from actors.packed import PackedBatch
from cluster import checkpoints, run_folder
from cluster.evaluation import BesideTraining
from cluster.system import System
from learner.nonfinite import NonFiniteError
from uniapl.config import ObjectiveConfig
from uniapl.feed import ROW_COUNTERS
from uniapl.leases import LEASE_COUNTERS
from uniapl.metrics import batch_metrics, time_split
from uniapl.mixing import GROUP_COUNTERS
from uniapl.objective.controllers import Controllers
from uniapl.records import MixedBatch, put_expert_scores
from uniapl.runlog import RunError

PARTS = ("generate", "score", "wait", "train", "evaluate", "broadcast")
"""Of a step's time, one after the other; `evaluate` is where new weights wait for an evaluation beside training."""


def one_step(
    system: System, controllers: Controllers, folder: Path, step: int, beside: BesideTraining
) -> dict[str, float]:
    """Consume one mixed batch, step once, publish the new weights; returns the step's metrics.

    Args:
        system: that runs.
        controllers: of the terms' weights.
        folder: of the run.
        step: steps made before.
        beside: begins evaluations and is asked for their results.

    Raises:
        RunError: loss or gradient is not finite; the batch is in the folder's failed/ then. Or a weight cannot follow
            what was measured; the batch is in batches/. Or the queue gave the batch of another step.
    """
    began = time.monotonic()
    taken = system.next_batch()
    waited = time.monotonic() - began
    if taken.step != step:
        wrong = f"step {step + 1}: the queue gave the batch of step {taken.step + 1}"
        raise RunError(f"{wrong}; {checkpoints.kept(folder)}")
    batch = MixedBatch(step, [packed.group() for packed in taken.groups], taken.demonstrations)

    beside.begin(step)
    ready = time.monotonic()
    weights = controllers.weights(step)
    with system.learners_turn():
        learned = _learn(system, folder, taken, batch, weights)
    trained = time.monotonic()
    held = beside.hold()
    evaluated = time.monotonic()
    sent = system.publish(step + 1)
    published = time.monotonic()

    metrics = (
        held
        | beside.collect()
        | batch_metrics(batch, system.config.objective, weights)
        | learned
        | sent
        | _weight_metrics(system.config.objective, weights)
    )
    kept = run_folder.save_batch(folder, batch, system.config, weights)
    _follow(controllers, step, metrics, kept)
    metrics |= time_split(waited, [(entry.generate_s, entry.score_s) for entry in taken.groups])
    metrics |= {"time/train": trained - ready, "time/broadcast": published - evaluated}
    metrics |= _queue_metrics(system.stats())
    metrics["time/step"] = time.monotonic() - began
    # Ahead of the learner, engines generate all the time, and little of it is waited for.
    generating = metrics["time/step" if system.config.queue.max_staleness else "time/generate"]
    if generating > 0 and "tokens/generated" in metrics:
        metrics["tokens/generated_per_s"] = metrics["tokens/generated"] / generating
    spent = sum(metrics.get(f"time/{part}", 0.0) for part in PARTS)
    metrics["time/other"] = metrics["time/step"] - spent
    return metrics


def _learn(
    system: System, folder: Path, taken: PackedBatch, batch: MixedBatch, weights: dict[str, float]
) -> dict[str, float]:
    """The learner's step; expert scores that were found in it stand in `batch` afterwards."""
    tokens = [group.tokens for group in taken.groups]
    try:
        metrics, scores = system.learner.step(batch.step, batch.groups, tokens, batch.demonstrations, weights)
    except NonFiniteError as error:
        if error.scores:
            put_expert_scores(batch.groups, error.scores)
        kept = run_folder.save_batch(folder, batch, system.config, weights, "failed")
        again = f"`uniapl replay {folder} {batch.step + 1}` makes the step again"
        raise RunError(f"step {batch.step + 1}: {error}; the batch is in {kept}; {again}") from None
    if scores:
        put_expert_scores(batch.groups, scores)
    return metrics


def _follow(controllers: Controllers, step: int, metrics: dict[str, float], kept: Path) -> None:
    try:
        controllers.update(step, metrics)
    except ValueError as error:
        again = f"`uniapl replay {kept.parent.parent} {step + 1}` makes the step again"
        raise RunError(f"{error}; the batch is in {kept}; {again}") from None


def _weight_metrics(objective: ObjectiveConfig, weights: dict[str, float]) -> dict[str, float]:
    """Of the terms that count at some time."""
    ever = [term for term, coefficient in objective.coefficients.items() if coefficient.ever_positive]
    return {f"weight/{term}": weights[term] for term in ever}


def _queue_metrics(stats: dict[str, Any]) -> dict[str, float]:
    keys = (*LEASE_COUNTERS, *GROUP_COUNTERS, *ROW_COUNTERS, "ready", "open", "waiting")
    return {f"queue/{key}": float(stats[key]) for key in keys if key in stats}
