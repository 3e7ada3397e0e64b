"""Tokens of a step, its time at given or measured rates, the bottleneck and the staleness that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from uniapl.config import Config, load_config
from uniapl.config_errors import ConfigError
from uniapl.plan.shape import DTYPE_BYTES, ModelShape
from uniapl.runlog import read_metrics

GPU_BANDWIDTH = 10.0
CPU_BANDWIDTH = 1.0
"""GB/s of a broadcast where nothing is given: what one 100 Gbit/s link does; gloo on one machine, with loading."""


@dataclass(frozen=True)
class Rates:
    """Tokens per second and GB/s; None: not known."""

    generate: float | None = None
    """Sampled tokens, of all engines together."""
    train: float | None = None
    """Tokens trained on, of all ranks together: a prompt counts once per sample, and everything once per optimizer
    step on it, as in `tokens/trained_per_s`."""
    bandwidth: float | None = None
    sample_tokens: float | None = None
    """Of one sampled response."""
    sequence_tokens: float | None = None
    """Of one sequence that is trained on, prompt included."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepTokens:
    """Of one optimizer step."""

    generated: float
    trained: float
    measured: bool
    """By a run; else the most that the configuration allows: every prompt and response at its limit."""


@dataclass(frozen=True)
class Pace:
    """One optimizer step, in seconds."""

    generate_s: float
    train_s: float
    broadcast_s: float
    step_s: float
    bottleneck: str
    staleness_mean: float
    staleness_max: int


def sequences(config: Config) -> tuple[int, int]:
    """Samples and demonstrations of a full step."""
    q, o = config.queue, config.objective
    samples = q.groups_per_step * config.rollout.group_size if o.uses_rollouts else 0
    return samples, q.demonstrations_per_step if o.uses_demonstrations else 0


def step_tokens(config: Config, rates: Rates) -> StepTokens:
    """At the lengths that a run measured; else at most, with every prompt and response at its limit:

    samples x max_tokens are generated, samples x (max_prompt_tokens + max_tokens) + demonstrations x
    (max_prompt_tokens + max_response_tokens) trained on.
    """
    d, (samples, shown) = config.data, sequences(config)
    if rates.sequence_tokens is not None and (rates.sample_tokens is not None or not samples):
        return StepTokens(samples * (rates.sample_tokens or 0.0), (samples + shown) * rates.sequence_tokens, True)
    trained = samples * (d.max_prompt_tokens + config.rollout.max_tokens)
    trained += shown * (d.max_prompt_tokens + d.max_response_tokens)
    return StepTokens(samples * config.rollout.max_tokens, trained, False)


def broadcast_bytes(config: Config, shape: ModelShape) -> int:
    """Every parameter once in `rollout.dtype`; every engine worker receives all of them. 0 without engines."""
    return shape.parameters * DTYPE_BYTES[config.rollout.dtype] if config.needs_engine else 0


def pace(config: Config, tokens: StepTokens, rates: Rates, sent_bytes: int, bandwidth: float) -> Pace | None:
    """One step: the sum of generating, training and broadcast, or with `queue.max_staleness` > 0 the larger of the
    first two and the broadcast. None where a rate that is needed is not known.

    Staleness: where training is slower, the queue is full and a token is `max_staleness` versions old. Where
    generating is slower, as many batches are under way as the engines hold groups of, m = groups in flight / groups of
    a step, at most `max_staleness` and at least as large a part of one as training takes of generating; a token is
    then between 0 and m versions old, m / 2 in the mean.
    """
    if (tokens.generated and not rates.generate) or not rates.train:
        return None
    generate_s = tokens.generated / rates.generate if rates.generate else 0.0
    train_s = tokens.trained * config.learner.steps_per_batch / rates.train
    broadcast_s = sent_bytes / 1e9 / bandwidth
    slower = "generating" if generate_s > train_s else "training"
    allowed = config.queue.max_staleness if tokens.generated else 0
    if not allowed:
        return Pace(generate_s, train_s, broadcast_s, generate_s + train_s + broadcast_s, slower, 0.0, 0)
    step_s = max(generate_s, train_s) + broadcast_s
    if slower == "training":
        return Pace(generate_s, train_s, broadcast_s, step_s, slower, float(allowed), allowed)
    in_flight = config.rollout.actors * config.rollout.groups_in_flight
    ahead = min(allowed, max(1.0, in_flight / config.queue.groups_per_step))
    return Pace(generate_s, train_s, broadcast_s, step_s, slower, ahead / 2, math.ceil(ahead))


def rates_of_run(folder: Path) -> Rates:
    """Medians over the steps of a run but the first, which begins with everything cold.

    Raises:
        ConfigError: the folder holds no run, or one of fewer than two steps.
    """
    records = read_metrics(folder)[1:]
    if not records or not (folder / "config.yaml").is_file():
        raise ConfigError(f"--run: got '{folder}'; allowed: the folder of a run of at least 2 steps")
    config = load_config(folder / "config.yaml")

    def of(key: str) -> float | None:
        values = [record[key] for record in records if key in record]
        return median(values) if values else None

    samples, shown = sequences(config)
    generated, trained = of("tokens/generated"), of("tokens/trained")
    sent, seconds = of("broadcast/bytes"), of("time/broadcast")
    asynchronous = config.queue.max_staleness > 0 and generated is not None
    note = f"{folder} was asynchronous: its engines may generate faster than they had to"
    return Rates(
        generate=of("tokens/generated_per_s"),
        train=of("tokens/trained_per_s"),
        bandwidth=sent / 1e9 / seconds if sent and seconds else None,
        sample_tokens=generated / samples if generated and samples else None,
        sequence_tokens=trained / (samples + shown) if trained else None,
        notes=(note,) if asynchronous else (),
    )
