"""The memory of one ZeRO-3 rank, part by part.

With P parameters, R ranks, N = P / R, b bytes of `learner.dtype` (2 or 4) and T tokens in a micro-batch:

    weights, this rank's part          b N
    weights, gathered                  b P with one rank, else b min(P, 1e9): DeepSpeed keeps up to so many
    float32 masters                    4 N (none beside float32 weights, which are their own)
    AdamW's two moments                8 N
    gradient sums                      4 N
    gradients of single terms          4 N for each term but the last, where `objective.diagnostics_every` measures them
    reduce bucket                      b 5e8 on a GPU, b 4e6 on a CPU
    activations                        T (layers x a + e), see `layer_bytes` and `edge_bytes`
    kept by the heap                   on a CPU 0.7 of the activations: measured
    gradients on their way             b B + 4 B / R with B = the largest parameter or, if that is more, min(P, bucket)

Before that, while a rank loads: 4 P of the machine's memory (float32), then b P of the GPU's, whole, which ZeRO-3 then
shards.

The frozen reference of the `kl` term adds b N and its gathered weights, the cotrained discriminator what a policy
without an output layer takes, one after the other with the policy's activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from uniapl.config import Config
from uniapl.objective.logprobs import CHUNK_LOGITS
from uniapl.objective.rows import WIDTH_STEP
from uniapl.plan.shape import DTYPE_BYTES, ModelShape

REDUCE_BUCKET, CPU_REDUCE_BUCKET = 500_000_000, 4_000_000
"""Gradients that are reduced together, as learner/device.py says."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default, which learner/zero.py keeps."""
CUDA_PROCESS_BYTES = 3 << 29
"""CUDA's context, nccl's buffers and what the allocator cannot use, 1.5 GiB: an estimate, not measured here."""
CPU_PROCESS_BYTES = 1 << 29
"""Python with torch, transformers and DeepSpeed loaded."""
HEAP_KEPT = 0.7
"""Of the activations: what glibc's heap keeps beside them on a CPU and cannot use again, with the settings of
learner/device.py. Fitted to six measurements (docs/plan.md)."""


@dataclass(frozen=True)
class Part:
    """Bytes of one kind; `exact`: they follow from sizes alone, else an estimate."""

    name: str
    bytes: float
    exact: bool = True


@dataclass(frozen=True)
class LearnerModels:
    """The shapes that a learner rank holds; None: not in this run."""

    policy: ModelShape
    reference: ModelShape | None = None
    discriminator: ModelShape | None = None

    @property
    def all(self) -> list[ModelShape]:
        return [model for model in (self.policy, self.reference, self.discriminator) if model is not None]


def layer_bytes(shape: ModelShape, dtype: str, width: int, dense_mask: bool) -> float:
    """What one transformer layer keeps of one token for the backward pass.

    Two norms (input in float32, normalised, output), queries, keys, values and their result, the gated feed-forward
    (gate, its activation, up, their product), where queries and keys have norms theirs, and for PyTorch's SDPA under a
    dense mask the token's row of the mask, with keys and values repeated for every head.

    Args:
        width: tokens of a row.
        dense_mask: on a CPU.
    """
    b = DTYPE_BYTES[dtype]
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * ((4 + 2 * b) * shape.hidden + 4)
    attention = b * (2 * queries + 2 * (queries if dense_mask else keys)) + 4 * shape.heads
    mask = b * width if dense_mask else 0
    head_norms = (4 + b) * (queries + keys) + 4 * (shape.heads + shape.kv_heads) if shape.qk_norm else 0
    return norms + attention + mask + head_norms + 4 * b * shape.intermediate


def edge_bytes(shape: ModelShape, dtype: str) -> float:
    """What is kept of one token outside of the layers: last norm, positions, and the hidden state of its target."""
    b = DTYPE_BYTES[dtype]
    return (4 + 2 * b) * shape.hidden + 2 * b * shape.head_dim


def activation_bytes(config: Config, shape: ModelShape, gpu: bool) -> float:
    """Of one micro-batch of full rows: the most there is between forward and backward pass."""
    c = config.learner
    width = -(-c.row_tokens // WIDTH_STEP) * WIDTH_STEP
    tokens = c.micro_batch_rows * width
    layer = layer_bytes(shape, c.dtype, width, dense_mask=not gpu)
    if not c.activation_checkpointing:
        return tokens * (shape.layers * layer + edge_bytes(shape, c.dtype))
    inputs = shape.layers * DTYPE_BYTES[c.dtype] * shape.hidden
    return tokens * (inputs + layer + edge_bytes(shape, c.dtype))


def learner_parts(config: Config, models: LearnerModels, gpu: bool) -> list[Part]:
    """All that one rank holds at its fullest moment."""
    shape, c = models.policy, config.learner
    b = DTYPE_BYTES[c.dtype]
    parts = _trained(shape, config, gpu)
    activations = activation_bytes(config, shape, gpu)
    if models.discriminator:
        beside = sum(part.bytes for part in _trained(models.discriminator, config, gpu))
        parts.append(Part("cotrained discriminator", beside, exact=False))
        activations = max(activations, activation_bytes(config, models.discriminator, gpu))
    if models.reference:
        held = b * (models.reference.parameters / c.ranks + gathered(models.reference, c.ranks))
        parts.append(Part("frozen reference", held, exact=False))
    parts.append(Part("activations", activations, exact=False))
    if terms := _measured_terms(config):
        parts.append(Part("gradients of single terms", 4 * (terms - 1) * shape.parameters / c.ranks, exact=False))
    if not gpu:
        parts.append(Part("kept by the heap", HEAP_KEPT * activations, exact=False))
    parts.append(Part("gradients on the way", _on_their_way(config, shape, gpu), exact=False))
    parts.append(Part("the process itself", CUDA_PROCESS_BYTES if gpu else CPU_PROCESS_BYTES, exact=False))
    return parts


def resting_bytes(config: Config, models: LearnerModels) -> float:
    """What a rank keeps of a GPU from step to step: all but what belongs to one pass."""
    passing = {"activations", "gradients on the way", "gradients of single terms"}
    return sum(part.bytes for part in learner_parts(config, models, gpu=True) if part.name not in passing)


def loading_bytes(config: Config, models: LearnerModels, gpu: bool) -> float:
    """What a rank's device holds while a model is whole there, before it is sharded: the policy comes first."""
    b, ranks = DTYPE_BYTES[config.learner.dtype], config.learner.ranks
    found, held = 0.0, float(CUDA_PROCESS_BYTES if gpu else CPU_PROCESS_BYTES)
    for place, model in enumerate((models.policy, models.reference, models.discriminator)):
        if model is not None:
            found = max(found, held + b * model.parameters * (1 + 1 / ranks))
            frozen = place == 1
            held += b * model.parameters / ranks if frozen else sum(p.bytes for p in _trained(model, config, gpu))
    return found


def host_bytes(models: LearnerModels) -> float:
    """What each rank takes of its machine's memory while it loads: a model is whole there, in float32."""
    return 4.0 * max(model.parameters for model in models.all)


def _trained(shape: ModelShape, config: Config, gpu: bool) -> list[Part]:
    """Of one trained model: what stays from step to step, and its gathered weights."""
    c = config.learner
    b, own = DTYPE_BYTES[c.dtype], shape.parameters / c.ranks
    bucket = REDUCE_BUCKET if gpu else CPU_REDUCE_BUCKET
    parts = [
        Part("weights, own part", b * own),
        Part("float32 masters", 4 * own if b < 4 else 0),
        Part("AdamW moments", 8 * own),
        Part("gradient sums", 4 * own),
        Part("weights, gathered", b * gathered(shape, c.ranks), exact=False),
        Part("reduce bucket", b * bucket, exact=False),
    ]
    return [part for part in parts if part.bytes]


def _measured_terms(config: Config) -> int:
    """Terms whose gradients are held side by side in some steps (learner/diagnostics.py)."""
    weights = config.objective.coefficients.values()
    return sum(weight.ever_positive for weight in weights) if config.objective.diagnostics_every else 0


def gathered(shape: ModelShape, ranks: int) -> int:
    """Parameters that are whole on a rank at one time, at most."""
    return shape.parameters if ranks == 1 else min(shape.parameters, LIVE_PARAMETERS)


def _on_their_way(config: Config, shape: ModelShape, gpu: bool) -> float:
    """A bucket being reduced and its float32 copy, the output layer's gradient, and the logits of one chunk."""
    c = config.learner
    bucket = max(min(shape.parameters, REDUCE_BUCKET if gpu else CPU_REDUCE_BUCKET), shape.largest)
    return (DTYPE_BYTES[c.dtype] + 4 / c.ranks) * bucket + 4 * shape.largest + 3 * 4 * CHUNK_LOGITS
