"""The memory of one rollout engine on each of its devices, and the sequences that its KV cache allows.

On a GPU vLLM takes `rollout.gpu_memory_utilization` of the memory; what weights and workspace leave of it is KV cache.
On a CPU the cache is `rollout.kv_cache_gib`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from uniapl.config import Config
from uniapl.plan.learner import Part
from uniapl.plan.shape import DTYPE_BYTES, ModelShape

STEP_TOKENS = 8192
"""Tokens of one engine step, prompts included."""
CUDA_ENGINE_BYTES = 1 << 30
"""CUDA's context and nccl's buffers: an estimate, not measured here."""
CPU_ENGINE_BYTES = 3 << 29
"""Python with torch and vLLM loaded, in two processes: an estimate."""


@dataclass(frozen=True)
class EngineMemory:
    """Of one device of one engine."""

    parts: list[Part]
    longest: int
    """Tokens of the longest prompt and response together."""
    kv_token_bytes: int
    kv_tokens: int
    """Of all sequences together; < 0: not even weights and workspace fit."""
    sequences: int
    """That run at a time, each of the longest."""
    wanted: int
    """Sequences that `rollout.groups_in_flight` asks for."""


def engine_memory(config: Config, shape: ModelShape, device_bytes: float | None) -> EngineMemory:
    """What an engine holds on each device.

    Args:
        device_bytes: memory of one GPU; None: on a CPU.
    """
    r = config.rollout
    b, tp = DTYPE_BYTES[r.dtype], 1 if device_bytes is None else r.tensor_parallel
    weights = Part("weights", b * shape.parameters / tp)
    workspace = Part("workspace of a step", _workspace(config, shape, tp), exact=False)
    own = Part("the process itself", CPU_ENGINE_BYTES if device_bytes is None else CUDA_ENGINE_BYTES, exact=False)
    used = weights.bytes + workspace.bytes + own.bytes
    cache = r.kv_cache_gib * (1 << 30)
    if device_bytes is not None:
        cache = r.gpu_memory_utilization * device_bytes - used
    token = shape.kv_bytes(r.dtype, tp)
    tokens = math.floor(cache / token)
    longest = config.data.max_prompt_tokens + r.max_tokens
    at_a_time = max(0, min(r.max_num_seqs, tokens // longest))
    parts = [weights, workspace, own, Part("KV cache", max(0, cache), exact=device_bytes is None)]
    return EngineMemory(parts, longest, token, tokens, at_a_time, r.groups_in_flight * r.group_size)


def _workspace(config: Config, shape: ModelShape, tp: int) -> float:
    """Activations of the widest layer for a step's tokens, and three float32 copies of its logits."""
    layer = 4 * shape.hidden + (2 * shape.intermediate + 2 * shape.heads * shape.head_dim) / tp
    logits = config.rollout.max_num_seqs * shape.vocabulary * 3 * 4
    return STEP_TOKENS * DTYPE_BYTES[config.rollout.dtype] * layer + logits
