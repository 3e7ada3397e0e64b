"""A whole plan: sizes, memory, broadcast, pace, and what does not fit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from uniapl.config import Config
from uniapl.discriminators.cotrained import backbone_path
from uniapl.plan.engine import EngineMemory, engine_memory
from uniapl.plan.fit import GIB, Machines, Misfit, gpus_needed, misfits
from uniapl.plan.learner import LearnerModels, Part, host_bytes, learner_parts, loading_bytes
from uniapl.plan.pace import CPU_BANDWIDTH, GPU_BANDWIDTH, Pace, Rates, StepTokens, broadcast_bytes, pace, step_tokens
from uniapl.plan.shape import ModelShape, read_shape


@dataclass(frozen=True)
class Plan:
    """All figures of a plan: bytes, tokens and seconds."""

    name: str
    model: str
    machines: Machines
    gpus: int
    """Needed; 0 on CPUs."""
    ranks: int
    engines: int
    tensor_parallel: int
    in_turns: bool
    """Engine and rank share one GPU."""
    shape: ModelShape
    learner: list[Part]
    loading_bytes: float
    """Of a learner rank's device while a model is whole there."""
    host_bytes: float
    """Of the machine's memory for each rank that loads."""
    engine: EngineMemory | None
    broadcast_bytes: int
    bandwidth: float
    """GB/s."""
    bandwidth_assumed: bool
    tokens: StepTokens
    max_staleness: int
    pace: Pace | None
    notes: list[str]
    misfits: list[Misfit]

    @property
    def learner_bytes(self) -> float:
        return sum(part.bytes for part in self.learner)

    @property
    def broadcast_s(self) -> float:
        return self.broadcast_bytes / 1e9 / self.bandwidth

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"learner_bytes": self.learner_bytes, "broadcast_s": self.broadcast_s}


def make_plan(config: Config, machines: Machines, rates: Rates) -> Plan:
    """By arithmetic: nothing is started, no weights are read.

    Raises:
        ConfigError: a model's config.json is missing or not that of a dense causal language model.
    """
    models, gpu = _models(config), machines.gpu
    shape = models.policy
    engine = engine_memory(config, shape, machines.gpu_gib * GIB if gpu else None) if config.needs_engine else None
    tokens, sent = step_tokens(config, rates), broadcast_bytes(config, shape)
    bandwidth = rates.bandwidth or (GPU_BANDWIDTH if gpu and not config.rollout.colocate else CPU_BANDWIDTH)
    return Plan(
        name=config.run.name,
        model=config.model.path,
        machines=machines,
        gpus=gpus_needed(config) if gpu else 0,
        ranks=config.learner.ranks,
        engines=config.rollout.actors if engine else 0,
        tensor_parallel=config.rollout.tensor_parallel if gpu else 1,
        in_turns=config.rollout.colocate and gpu,
        shape=shape,
        learner=learner_parts(config, models, gpu),
        loading_bytes=loading_bytes(config, models, gpu),
        host_bytes=host_bytes(models),
        engine=engine,
        broadcast_bytes=sent,
        bandwidth=bandwidth,
        bandwidth_assumed=rates.bandwidth is None,
        tokens=tokens,
        max_staleness=config.queue.max_staleness,
        pace=pace(config, tokens, rates, sent, bandwidth),
        notes=[*rates.notes, *_notes(config, engine)],
        misfits=misfits(config, models, engine, machines),
    )


def _models(config: Config) -> LearnerModels:
    """Shapes of all models that a learner rank holds."""
    o, reference, discriminator = config.objective, None, None
    policy = read_shape("model.path", config.model.path)
    if o.kl.weight.ever_positive:
        other = o.kl.reference
        reference = read_shape("objective.kl.reference", other) if other else policy
    if o.cotrained:
        path = backbone_path(config)
        key = "model.path" if path == config.model.path else "objective.adversarial.cotrained.model"
        discriminator = read_shape(key, path, output_layer=False)
    return LearnerModels(policy, reference, discriminator)


def _notes(config: Config, engine: EngineMemory | None) -> list[str]:
    notes = []
    if engine and config.objective.uses_rollouts and engine.sequences < engine.wanted:
        held = "rollout.max_num_seqs" if engine.sequences == config.rollout.max_num_seqs else "the KV cache"
        notes.append(
            f"an engine is asked for {engine.wanted} sequences at a time (rollout.groups_in_flight x group_size), "
            f"{held} takes {engine.sequences} of full length: the others wait in it"
        )
    if config.objective.adversarial.discriminator not in ("none", "cotrained"):
        notes.append("the frozen discriminator is in the reward service's replicas, on CPUs: not counted here")
    return notes
