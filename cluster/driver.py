"""The training loop: mixed batches in, one optimizer step each, weights back to the engines."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from actors.packed import PackedBatch
from cluster import run_folder
from cluster.evaluation import evaluate
from cluster.failures import told_in_one_line
from cluster.preflight import preflight
from cluster.ray_session import ray_session
from cluster.resume import checkpoint, restore
from cluster.self_check import check_weight_round_trip, compare_after_training
from cluster.signals import Signals
from cluster.system import System
from learner.nonfinite import NonFiniteError
from uniapl.config import Config, ObjectiveConfig
from uniapl.live import LiveTable
from uniapl.metrics import batch_metrics, time_split
from uniapl.objective.controllers import Controllers
from uniapl.records import MixedBatch, Prompt, put_expert_scores
from uniapl.report import write_report
from uniapl.runlog import RunError, RunLog


def train(config: Config, resume: bool = False) -> Path:
    """Run the configuration to its end and write the report.

    Args:
        config: of the run.
        resume: go on from the newest whole checkpoint of the run's folder.

    Returns:
        the path of report.html.

    Raises:
        ConfigError, DataError: before any process starts.
        RunError: the run cannot go on; one line that says why.
        Terminated: by SIGTERM, after a checkpoint where `run.grace_seconds` allowed one.
    """
    heldout = preflight(config)
    folder = run_folder.open_run(config, resume)
    log = RunLog(folder, config.logging.tensorboard)
    try:
        with LiveTable(config.run.steps) as live:
            live.phase("starting Ray")
            with (
                Signals(config.run.grace_seconds) as signals,
                ray_session(config) as gpu,
                System(config, gpu, live.note) as system,
                told_in_one_line(system, folder),
            ):
                signals.arm()  # Ray took SIGTERM
                live.phase("loading engines, learner and reward service")
                system.start()
                controllers = Controllers(config.objective)
                first = restore(system, controllers, folder, log) if resume else 0
                live.phase("checking the weight round trip")
                live.note(check_weight_round_trip(system, first))
                _evaluate(system, folder, live, heldout, first, "before" if first == 0 else None)
                live.phase("training")
                system.begin_rollouts()
                for step in range(first, config.run.steps):
                    with signals.step():
                        metrics = one_step(system, controllers, folder, step)
                        log.log(step + 1, metrics)
                        live.step(step + 1, metrics)
                        checkpoint(system, controllers, folder, step + 1, live, signals.asked)
                if compared := compare_after_training(system):
                    live.note(compared)
                _evaluate(system, folder, live, heldout, config.run.steps, "after")
                live.phase("writing the model")
                system.learner.export(folder / "model")
                live.phase("stopping")
    except BaseException:
        with suppress(OSError):  # such as a full disk, which is what the run ended with
            log.close()
            write_report(folder)
        raise
    log.close()
    return write_report(folder)


def one_step(system: System, controllers: Controllers, folder: Path, step: int) -> dict[str, float]:
    """Consume one mixed batch, step once, publish the new weights; returns the step's metrics.

    Raises:
        RunError: loss or gradient is not finite; the batch is in the folder's failed/ then.
    """
    began = time.monotonic()
    taken = system.next_batch()
    waited = time.monotonic() - began
    if taken.step != step:
        raise RuntimeError(f"the queue gave the batch of step {taken.step}, expected was {step}")
    batch = MixedBatch(step, [packed.group() for packed in taken.groups], taken.demonstrations)

    ready = time.monotonic()
    weights = controllers.weights(step)
    learned = _learn(system, folder, taken, batch, weights)
    trained = time.monotonic()
    sent = system.publish(step + 1)
    published = time.monotonic()

    metrics = batch_metrics(batch) | learned | sent | _weight_metrics(system.config.objective, weights)
    controllers.update(step, metrics)
    metrics |= time_split(waited, [(entry.generate_s, entry.score_s) for entry in taken.groups])
    metrics |= {"time/train": trained - ready, "time/broadcast": published - trained}
    metrics |= _queue_metrics(system.stats())
    run_folder.save_batch(folder, batch)
    metrics["time/step"] = time.monotonic() - began
    # Ahead of the learner, engines generate all the time, and little of it is waited for.
    generating = metrics["time/step" if system.config.queue.max_staleness else "time/generate"]
    if generating > 0 and "tokens/generated" in metrics:
        metrics["tokens/generated_per_s"] = metrics["tokens/generated"] / generating
    spent = sum(metrics[f"time/{part}"] for part in ("generate", "score", "wait", "train", "broadcast"))
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
        kept = run_folder.save_batch(folder, batch, "failed")
        raise RunError(f"step {batch.step + 1}: {error}; the batch is in {kept}") from None
    if scores:
        put_expert_scores(batch.groups, scores)
    return metrics


def _weight_metrics(objective: ObjectiveConfig, weights: dict[str, float]) -> dict[str, float]:
    """Of the terms that count at some time."""
    ever = [term for term, coefficient in objective.coefficients.items() if coefficient.ever_positive]
    return {f"weight/{term}": weights[term] for term in ever}


def _queue_metrics(stats: dict[str, Any]) -> dict[str, float]:
    keys = (
        "leased",
        "committed",
        "consumed",
        "released",
        "expired",
        "ready",
        "open",
        "waiting",
        "dropped_stale",
        "stale_used",
        "dropped_unscored",
        "regenerated",
        "resampled",
        "kept_equal",
        "aborted",
        "stragglers_accepted",
        "stragglers_reissued",
        "dropped_straggler",
        "dropped_lethal",
    )
    return {f"queue/{key}": float(stats[key]) for key in keys if key in stats}


def _evaluate(
    system: System, folder: Path, live: LiveTable, prompts: list[Prompt], step: int, name: str | None
) -> None:
    if not prompts or name is None:
        return
    live.phase(f"evaluating on {len(prompts)} held-out prompts")
    found = evaluate(system, prompts, step)
    found.save(folder / "eval" / f"{name}.json")
    rate = found.pass_rate
    if rate is not None:
        live.note(
            f"held-out pass rate {name} training: {rate.value:.1%} (95 % interval {rate.low:.1%} to {rate.high:.1%})"
        )
