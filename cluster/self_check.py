"""Checks at start-up that stop a run whose engines and learner do not agree, before it wastes hours."""

from __future__ import annotations

import ray
import torch

from cluster.system import System
from uniapl.objective.sequences import TrainingSequence
from uniapl.objective.terms import k3
from uniapl.records import Sample

TOKENS = 16
SAMPLES = 4
PROBE_SCALE = 0.5
KL_BOUND = {"float32": 1e-5, "bfloat16": 2e-2}
"""Mean k3 estimate of KL(engine || learner) per token. Two float32 programs differ by rounding alone;
bfloat16 on either side moves single log-probabilities by some hundredths."""


class SelfCheckError(RuntimeError):
    """Engines and learner do not hold the same weights, or do not compute the same with them."""


def check_weight_round_trip(system: System, version: int) -> str:
    """Send changed weights, then the true ones, and compare engine and learner after each.

    The changed weights (every norm scaled) must change what the engine says; the true ones must bring
    its log-probabilities into agreement with the learner's. Leaves the true weights published.

    Args:
        system: started.
        version: of the learner's present weights.

    Returns:
        a line for the user.

    Raises:
        SelfCheckError: one of the two did not happen.
    """
    if not system.engines:
        system.publish(version)
        return "no rollout engine: nothing to check"
    config = system.config
    low = "bfloat16" if "bfloat16" in (config.rollout.dtype, config.learner.dtype) else "float32"
    system.learner.broadcast(version, PROBE_SCALE)
    changed = [divergence(system, samples) for samples in _sample_all(system)]
    system.publish(version)
    true = [divergence(system, samples) for samples in _sample_all(system)]
    for number, (off, on) in enumerate(zip(changed, true, strict=True)):
        if off <= KL_BOUND[low]:
            raise SelfCheckError(f"rollout-{number}: other weights were sent and its output did not change")
        if on > KL_BOUND[low]:
            raise SelfCheckError(
                f"rollout-{number}: KL between engine and learner is {on:.2g} per token with the same weights; "
                f"allowed: <= {KL_BOUND[low]:g} in {low}"
            )
    return f"engine and learner agree: KL {max(true):.1e} per token (with changed weights {min(changed):.1e})"


def _sample_all(system: System) -> list[list[Sample]]:
    calls = [e.generate.remote(_prompt(), SAMPLES, 1.0, TOKENS, seed=1) for e in system.engines]
    return ray.get(calls)


def _prompt() -> list[int]:
    return list(range(10, 26))


def divergence(system: System, samples: list[Sample]) -> float:
    """Mean k3 estimate per token of KL(engine || learner) on the engine's own samples."""
    sequences = [TrainingSequence(str(i), _prompt(), s.token_ids, 1.0) for i, s in enumerate(samples)]
    ours = [value for row in system.learner.logprobs(sequences) for value in row]
    drawn = torch.tensor([value for sample in samples for value in sample.logprobs], dtype=torch.float64)
    other = torch.tensor(ours, dtype=torch.float64)
    return k3(drawn, other, torch.ones_like(drawn, dtype=torch.bool)).mean().item()
