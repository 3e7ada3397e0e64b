"""Whether engines and learner agree: at start-up, before a run wastes hours, and when it is over."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from statistics import fmean

import ray
from ray.exceptions import RayError

from cluster.system import System
from uniapl.objective.sequences import TrainingSequence
from uniapl.records import Sample
from uniapl.runlog import RunError

TOKENS = 16
SAMPLES = 4
PROBE_SCALE = 0.5
KL_BOUND = {"float32": 1e-5, "bfloat16": 2e-2}
"""Mean k3 estimate of KL(engine || learner) per token. Two float32 programs differ by rounding alone;
bfloat16 on either side moves single log-probabilities by some hundredths."""

_NEXT = "; try rollout.dtype=float32 learner.dtype=float32: if it stays, vLLM computes this model otherwise"


class SelfCheckError(RunError):
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
    low = _lowest_dtype(system)
    system.send(version, PROBE_SCALE)
    changed = _divergences(system)
    system.publish(version)
    true = _divergences(system)
    both = [name for name in true if name in changed]
    if not both:
        raise SelfCheckError("every rollout engine was lost during the check; `train --debug` shows their logs")
    for name in both:
        if changed[name] <= KL_BOUND[low]:
            raise SelfCheckError(f"{name}: other weights were sent and its output did not change{_NEXT}")
        if true[name] > KL_BOUND[low]:
            raise SelfCheckError(
                f"{name}: KL between engine and learner is {true[name]:.2g} per token with the same weights; "
                f"allowed: <= {KL_BOUND[low]:g} in {low}{_NEXT}"
            )
    on, off = max(true[name] for name in both), min(changed[name] for name in both)
    return f"engine and learner agree: KL {on:.1e} per token (with changed weights {off:.1e})"


def compare_after_training(system: System) -> str:
    """Compare every engine with the learner after the last broadcast.

    Engines may be generating. A difference does not stop a run that has all its steps behind it: it is warned of,
    since the evaluation after training is done by the engines.

    Returns:
        a line for the user, which names those that gave no answer; empty where there is no engine.
    """
    engines = list(system.engines)
    if not engines:
        return ""
    found = _divergences(system)
    silent = "".join(f"; {name} gave no answer" for name in engines if name not in found)
    if not found:
        return f"after the last broadcast no engine could be compared with the learner{silent}"
    most, low = max(found.values()), _lowest_dtype(system)
    differ = not most <= KL_BOUND[low]  # a NaN differs
    verdict = f"DIFFER (more than {KL_BOUND[low]:g} in {low})" if differ else "agree"
    count = f"{len(found)} engine{'s' if len(found) > 1 else ''}"
    line = f"after the last broadcast {count} and the learner {verdict}: KL {most:.1e} per token{silent}"
    if differ:
        warnings.warn(f"{line}; the evaluation after training is not one of the model that is written", stacklevel=2)
    return line


def _lowest_dtype(system: System) -> str:
    config = system.config
    return "bfloat16" if "bfloat16" in (config.rollout.dtype, config.learner.dtype) else "float32"


def _divergences(system: System) -> dict[str, float]:
    """By engine; one that fails here is left out. It is named after training, and lost at a next broadcast."""
    calls = {
        name: engine.generate.remote(_prompt(), SAMPLES, 1.0, TOKENS, seed=1) for name, engine in system.engines.items()
    }
    sampled = {}
    for name, call in calls.items():
        with suppress(RayError):
            sampled[name] = ray.get(call, timeout=system.config.cluster.step_timeout_s)
    return {name: divergence(system, samples) for name, samples in sampled.items()}


def _prompt() -> list[int]:
    return list(range(10, 26))


def divergence(system: System, samples: list[Sample]) -> float:
    """Mean k3 estimate per token of KL(engine || learner) on the engine's own samples."""
    sequences = [TrainingSequence(str(i), _prompt(), s.token_ids, 1.0) for i, s in enumerate(samples)]
    ours = [value for row in system.learner.logprobs(sequences) for value in row]
    drawn = [value for sample in samples for value in sample.logprobs]
    # As `uniapl.objective.terms.k3`, which would have the driver load torch.
    return fmean(math.expm1(o - d) - (o - d) for d, o in zip(drawn, ours, strict=True))
