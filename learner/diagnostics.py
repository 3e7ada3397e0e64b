"""The gradient of every term on its own, and of their sum the step itself."""

from __future__ import annotations

from torch import Tensor

from learner.gradients import discard, local_partition, norms_and_cosines
from learner.passes import Passes, Tally, plan_micro_batches
from uniapl.config import LearnerConfig
from uniapl.objective.sequences import TrainingSequence
from uniapl.objective_config import TERMS

OF_DEMONSTRATIONS = ("demonstration",)
OF_SAMPLES = tuple(term for term in TERMS if term not in OF_DEMONSTRATIONS)


def run_term_by_term(
    passes: Passes, sequences: list[TrainingSequence], config: LearnerConfig, tally: Tally
) -> dict[str, float]:
    """Backward of one term after the other; leaves their sum in the engine, as one pass for all would.

    Demonstrations and samples go apart, so that the demonstration term costs nothing more than it does
    anyway; every further term on samples costs one more pass over them. Memory: one float32 gradient
    partition per term. The norms are of weight x term, as the step sees it. A collective.

    Returns:
        gradient/norm_<term> and gradient/cosine_<a>_<b>.
    """
    parts: list[tuple[str | None, Tensor]] = []
    buffer = local_partition(passes.engine)
    for terms in (OF_DEMONSTRATIONS, OF_SAMPLES):
        present = [t for t in terms if passes.counts[TERMS.index(t)] > 0]
        if not present:
            continue
        mine = [s for s in sequences if s.sampled == (terms == OF_SAMPLES)]
        batches = plan_micro_batches(mine, config, passes.device)
        # Terms that are only measured in this step have a weight of 0 and still want one pass.
        wanted: list[str | None] = [t for t in present if passes.weights[t] > 0] or [None]
        for term in wanted:
            first = term == wanted[0]
            if parts:
                parts[-1] = (parts[-1][0], buffer.clone())
                discard(passes.engine)
            passes.run(batches, tally if first else None, terms, term, entropy=first and terms == OF_SAMPLES)
            parts.append((term, buffer))
    if not parts:  # a batch in which nothing counts
        passes.run(plan_micro_batches([], config, passes.device), tally)
    found = norms_and_cosines({name: part for name, part in parts if name is not None}, passes.device)
    for _, part in parts[:-1]:
        buffer.add_(part)
    return found
