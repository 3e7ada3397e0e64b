"""Random small batches with log-probabilities, and what `uniapl.objective` makes of them."""

from __future__ import annotations

import random
from typing import Any

import torch
from oracle_objective import Known
from torch import Tensor

from uniapl.config import ObjectiveConfig
from uniapl.objective.objective import RowsLoss, rows_loss
from uniapl.objective.rows import count_terms, make_rows
from uniapl.objective.sequences import TrainingSequence, training_sequences
from uniapl.records import Demonstration, Group, MixedBatch, Prompt, Sample, Score, VersionSpan

LONGEST = 8
TEMPERATURE = 0.7


def make_objective(**sections: dict[str, Any]) -> ObjectiveConfig:
    """All four terms at work, with the given values over it."""
    tree: dict[str, Any] = {
        "preference": {"weight": 0.7, "clip_high": 0.3},
        "demonstration": {"weight": 0.3},
        "adversarial": {"weight": 0.2, "clip_low": 0.1, "discriminator": "embedding"},
        "kl": {"weight": 0.05},
    }
    return ObjectiveConfig.model_validate({k: tree.get(k, {}) | sections.get(k, {}) for k in tree | sections})


def weights_of(objective: ObjectiveConfig) -> dict[str, float]:
    return {term: coefficient.value for term, coefficient in objective.coefficients.items()}


def random_batch(seed: int, groups: int = 3, size: int = 4, demonstrations: int = 3) -> MixedBatch:
    """Responses of 0 to 7 tokens; every third group has no expert response; one group is of equal rewards."""
    rng = random.Random(seed)
    found = []
    for g in range(groups):
        samples = []
        for i in range(size):
            n = rng.randint(0, 7)
            reward = 1.0 if g == 1 else rng.choice([0.0, 0.5, 1.0])
            score = Score(reward=reward, expert_score=None if g % 3 == 2 else rng.uniform(-0.2, 0.9))
            ids = [10 + (g + i + t) % 50 for t in range(n)]
            logprobs = [-rng.expovariate(1.0) for _ in range(n)]
            samples.append(Sample(ids, logprobs, [VersionSpan(0, n, 0)], "", "stop", score))
        found.append(Group(g, Prompt(f"p{g}", [], list(range(5, 7 + g))), samples, "a"))
    shown = [Demonstration(f"d{i}", [5, 6], [30 + i + t for t in range(1 + i)]) for i in range(demonstrations)]
    return MixedBatch(0, found, shown)


def random_logprobs(batch: MixedBatch, seed: int) -> dict[str, Known]:
    """For every response: the policy near the behaviour's log-probabilities, some ratios beyond every clip."""
    generator = torch.Generator().manual_seed(seed)

    def near(base: Tensor, spread: float) -> Tensor:
        noise = torch.randn(len(base), generator=generator, dtype=torch.float64)
        return (base + spread * noise).clamp(max=-1e-3)

    bases = {f"{g.prompt.id}/{i}": s.logprobs for g in batch.groups for i, s in enumerate(g.samples)}
    bases |= {d.id: [-0.7 * (t + 0.2) for t in range(len(d.response_ids))] for d in batch.demonstrations}
    found = {}
    for key, base in bases.items():
        start = near(torch.tensor(base, dtype=torch.float64), 0.5)
        found[key] = Known(near(start, 0.3).requires_grad_(), start, near(start, 0.4))
    return found


def sequences_of(batch: MixedBatch, objective: ObjectiveConfig) -> list[TrainingSequence]:
    return training_sequences(batch, objective, TEMPERATURE, weights_of(objective), LONGEST)


def loss_of(
    sequences: list[TrainingSequence], counts: Tensor, objective: ObjectiveConfig, known: dict[str, Known]
) -> RowsLoss:
    """The packed loss of `sequences`, all in one row, in float64."""
    rows = make_rows([[[s] for s in sequences]])

    def column(name: str) -> Tensor:
        values = [getattr(known[s.id], name) for s in sequences]
        return torch.cat(values) if values else torch.zeros(0, dtype=torch.float64, requires_grad=True)

    return rows_loss(
        column("current"),
        rows,
        counts,
        weights_of(objective),
        objective,
        reference=column("reference").detach(),
        proximal=column("start").detach(),
    )


def whole_loss(batch: MixedBatch, objective: ObjectiveConfig, known: dict[str, Known]) -> RowsLoss:
    sequences = sequences_of(batch, objective)
    return loss_of(sequences, count_terms(sequences), objective, known)
