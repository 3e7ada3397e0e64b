"""What of a plan does not fit, and which key to change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from uniapl.config import Config
from uniapl.plan.engine import CUDA_ENGINE_BYTES, EngineMemory, engine_memory
from uniapl.plan.learner import (
    CPU_PROCESS_BYTES,
    LearnerModels,
    host_bytes,
    learner_parts,
    loading_bytes,
    resting_bytes,
)

GIB = 1 << 30
MOST_RANKS = 1024
USABLE = 0.95
"""Of a device's memory: the rest is for what no formula knows."""


@dataclass(frozen=True)
class Machines:
    """What a plan is for. `gpus` 0: CPUs alone; None: as many GPUs as the configuration asks for."""

    gpus: int | None = None
    node_gpus: int = 8
    gpu_gib: float = 80.0
    cpu_gib: float = 16.0
    """Of the whole machine, where there is no GPU."""
    node_gib: float | None = None
    """Memory of a node with GPUs, beside theirs; None: not compared."""

    @property
    def gpu(self) -> bool:
        return self.gpus != 0


@dataclass(frozen=True)
class Misfit:
    """What does not fit, and what to do about it."""

    what: str
    change: str

    def __str__(self) -> str:
        return f"what does not fit: {self.what}; change {self.change}"


def learner_bytes(config: Config, models: LearnerModels, gpu: bool) -> float:
    return sum(part.bytes for part in learner_parts(config, models, gpu))


def gpus_needed(config: Config) -> int:
    """One for each learner rank, `rollout.tensor_parallel` for each engine that does not share the learner's."""
    if config.rollout.colocate:
        return 1
    engines = config.rollout.actors if config.needs_engine else 0
    return config.learner.ranks + engines * config.rollout.tensor_parallel


def misfits(config: Config, models: LearnerModels, engine: EngineMemory | None, machines: Machines) -> list[Misfit]:
    """One entry for each thing that does not fit; empty when everything does."""
    if not machines.gpu:
        return list(_on_cpu(config, models, engine, machines))
    found = [*_gpus(config, machines), *_learner(config, models, machines), *_node(config, models, machines)]
    if config.rollout.colocate and engine:
        found += _in_turns(config, models, machines)
    return found + (list(_engine(config, models, engine, machines)) if engine else [])


def _on_cpu(config: Config, models: LearnerModels, engine: EngineMemory | None, machines: Machines) -> Iterator[Misfit]:
    """All processes share one machine's memory."""
    rank = max(learner_bytes(config, models, gpu=False), CPU_PROCESS_BYTES + host_bytes(models))
    learner = config.learner.ranks * rank
    engines = config.rollout.actors * sum(part.bytes for part in engine.parts) if engine else 0.0
    if learner + engines > machines.cpu_gib * GIB:
        yield Misfit(
            f"{config.learner.ranks} learner ranks of {rank / GIB:.1f} GiB and "
            f"engines of {engines / GIB:.1f} GiB into {machines.cpu_gib:.1f} GiB",
            "learner.micro_batch_rows, learner.row_tokens or rollout.kv_cache_gib to less, or use a larger machine",
        )
    r = config.rollout
    if engine and engine.kv_tokens < r.max_model_len:  # vLLM does not start then
        yield Misfit(
            f"a sequence of {r.max_model_len:,} tokens (rollout.max_model_len) into a KV cache of {engine.kv_tokens:,}",
            f"rollout.kv_cache_gib to {math.ceil(100 * r.max_model_len * engine.kv_token_bytes / GIB) / 100:g}",
        )


def _gpus(config: Config, machines: Machines) -> Iterator[Misfit]:
    """Enough of them, and an engine's on one node."""
    tp, engines = config.rollout.tensor_parallel, config.rollout.actors if config.needs_engine else 0
    needed = gpus_needed(config)
    if engines and tp > machines.node_gpus:
        yield Misfit(
            f"an engine of {tp} GPUs on a node of {machines.node_gpus}",
            f"rollout.tensor_parallel to {machines.node_gpus}",
        )
    if machines.gpus is not None and needed > machines.gpus:
        room = machines.gpus - config.learner.ranks
        change = f"rollout.actors to {room // tp}" if room >= tp > 0 else f"learner.ranks to less than {machines.gpus}"
        yield Misfit(
            f"{config.learner.ranks} learner ranks and {engines} engines of {tp} = {needed} GPUs on {machines.gpus}",
            change,
        )


def _learner(config: Config, models: LearnerModels, machines: Machines) -> Iterator[Misfit]:
    limit = USABLE * machines.gpu_gib * GIB
    needed = learner_bytes(config, models, gpu=True)
    if needed > limit:
        what = f"a learner rank of {needed / GIB:.1f} GiB on a GPU of {machines.gpu_gib:g} GiB ({USABLE:.0%} usable)"
        yield Misfit(what, _learner_change(config, models, limit))
    loading = loading_bytes(config, models, gpu=True)
    if loading > limit:
        change = "model.path to a smaller model, or use GPUs with more memory"
        if config.learner.dtype == "float32":
            change = "learner.dtype to bfloat16"
        yield Misfit(
            f"{loading / GIB:.1f} GiB on each learner rank's GPU while it loads: the model is whole there at first",
            change,
        )


def _in_turns(config: Config, models: LearnerModels, machines: Machines) -> Iterator[Misfit]:
    """On the GPU that they share: the learner at work beside a sleeping engine, the engine beside a resting learner."""
    limit, gpu = USABLE * machines.gpu_gib * GIB, machines.gpu_gib * GIB
    training = learner_bytes(config, models, gpu=True) + CUDA_ENGINE_BYTES
    if training > limit >= training - CUDA_ENGINE_BYTES:  # without the engine it fits
        yield Misfit(
            f"a learner rank and a sleeping engine, {training / GIB:.1f} GiB, on a GPU of {machines.gpu_gib:g} GiB",
            _learner_change(config, models, limit - CUDA_ENGINE_BYTES),
        )
    resting, share = resting_bytes(config, models), config.rollout.gpu_memory_utilization
    if resting + share * gpu > limit:
        yield Misfit(
            f"an engine with {share:.0%} of a GPU of {machines.gpu_gib:g} GiB beside a resting learner of "
            f"{resting / GIB:.1f} GiB",
            f"rollout.gpu_memory_utilization to {max(0, math.floor(100 * (limit - resting) / gpu)) / 100:g}",
        )


def _node(config: Config, models: LearnerModels, machines: Machines) -> Iterator[Misfit]:
    """All ranks of a node load at the same time."""
    ranks, each = min(config.learner.ranks, machines.node_gpus), host_bytes(models) / GIB
    if machines.node_gib is not None and ranks * each > machines.node_gib:
        yield Misfit(
            f"{ranks} ranks that load a model of {each:.1f} GiB each into a node of {machines.node_gib:g} GiB: "
            "it is whole in the memory of every one of them at first, in float32",
            "model.path to a smaller model, or use nodes with more memory",
        )


def _learner_change(config: Config, models: LearnerModels, limit: float) -> str:
    """No term measured alone, or the mildest of these, on top of one another: fewer rows, checkpointing, more ranks,
    shorter rows."""
    if config.objective.diagnostics_every:
        unmeasured = config.objective.model_copy(update={"diagnostics_every": 0})
        if learner_bytes(config.model_copy(update={"objective": unmeasured}), models, gpu=True) <= limit:
            return "objective.diagnostics_every to 0"
    c = config.learner
    steps: list[tuple[str, int | bool]] = []
    if c.micro_batch_rows > 1:
        steps.append(("micro_batch_rows", 1))
    if not c.activation_checkpointing:
        steps.append(("activation_checkpointing", True))
    ranks = MOST_RANKS if config.rollout.colocate else c.ranks
    while (ranks := 2 * ranks) <= MOST_RANKS:
        steps.append(("ranks", ranks))
    d = config.data
    longest = d.max_prompt_tokens + max(config.rollout.max_tokens, d.max_response_tokens)
    changed: dict[str, int | bool] = {}
    for key, value in steps:
        changed[key] = value
        if _with(config, models, changed) <= limit:
            return _words(changed)
    changed = {key: value for key, value in changed.items() if key != "ranks"} | {"row_tokens": longest}
    if _with(config, models, changed) <= limit:
        return _words(changed)
    return "data.max_response_tokens and rollout.max_tokens to less: no number of ranks makes room for such rows"


def _with(config: Config, models: LearnerModels, changed: dict[str, int | bool]) -> float:
    other = config.model_copy(update={"learner": config.learner.model_copy(update=changed)})
    return learner_bytes(other, models, gpu=True)


def _words(changed: dict[str, int | bool]) -> str:
    return " and ".join(f"learner.{key} to {str(value).lower()}" for key, value in changed.items())


def _engine(config: Config, models: LearnerModels, engine: EngineMemory, machines: Machines) -> Iterator[Misfit]:
    r, shape = config.rollout, models.policy
    if shape.heads % r.tensor_parallel:
        fitting = ", ".join(str(tp) for tp in (1, 2, 4, 8, 16) if shape.heads % tp == 0)
        yield Misfit(
            f"{shape.heads} attention heads on {r.tensor_parallel} GPUs", f"rollout.tensor_parallel to {fitting}"
        )
    elif engine.kv_tokens < r.max_model_len:  # vLLM does not start then
        weights = engine.parts[0].bytes / GIB
        yield Misfit(
            f"an engine: weights of {weights:.1f} GiB leave a KV cache of {max(0, engine.kv_tokens):,} tokens, "
            f"one sequence may have {r.max_model_len:,}",
            _engine_change(config, models, machines),
        )


def _engine_change(config: Config, models: LearnerModels, machines: Machines) -> str:
    r, tp = config.rollout, config.rollout.tensor_parallel
    while (tp := 2 * tp) <= machines.node_gpus and models.policy.heads % tp == 0:
        other = config.model_copy(update={"rollout": r.model_copy(update={"tensor_parallel": tp})})
        if engine_memory(other, models.policy, machines.gpu_gib * GIB).kv_tokens >= r.max_model_len:
            return f"rollout.tensor_parallel to {tp}"
    return "rollout.max_model_len to less, or use GPUs with more memory"
