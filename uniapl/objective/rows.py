"""Packed rows: sequences laid end to end, with the loss signals of every target token."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from uniapl.objective.sequences import TrainingSequence

TERMS = ("demonstration", "preference", "adversarial")


@dataclass(frozen=True)
class Rows:
    """B packed rows of T tokens, the shorter ones padded. N: response tokens, the only ones with a loss.

    `position_ids` restart at every sequence: the model builds a block-diagonal mask from them. Every
    padding token is a sequence of its own, so that nothing attends to it.
    """

    input_ids: Tensor  # [B, T]
    position_ids: Tensor  # [B, T]
    index: Tensor  # [N] where in the B * T tokens the hidden state stands that predicts the target
    targets: Tensor  # [N]
    temperature: Tensor  # [N]
    behaviour: Tensor  # [N] log-probabilities; 0 for demonstrations
    demonstration: Tensor  # [N] 1 for tokens of a demonstration
    preference: Tensor  # [N] 1 for tokens that count in the preference term
    preference_advantage: Tensor  # [N]
    adversarial: Tensor  # [N]
    adversarial_advantage: Tensor  # [N]

    def to(self, device: torch.device | str) -> Rows:
        return Rows(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def make_rows(rows: list[list[TrainingSequence]]) -> Rows:
    """Lay the sequences of every row end to end. Without any there is one token that carries no loss.

    Targets, and so the log-probabilities of a forward pass, stand in the order of the sequences.
    """
    width = max([sum(len(s) for s in row) for row in rows], default=0)
    if width == 0:
        return _no_rows()
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    index: list[int] = []
    targets: list[int] = []
    columns: dict[str, list[float]] = {name: [] for name in _SIGNALS}
    for b, row in enumerate(rows):
        at = 0
        for s in row:
            ids[b, at : at + len(s)] = torch.tensor([*s.prompt_ids, *s.response_ids])
            positions[b, at : at + len(s)] = torch.arange(len(s))
            first = b * width + at + len(s.prompt_ids) - 1
            index += range(first, first + len(s.response_ids))
            targets += s.response_ids
            for name, value in _signals(s).items():
                columns[name] += value if isinstance(value, list) else [value] * len(s.response_ids)
            at += len(s)
    signals = {name: torch.tensor(column, dtype=torch.float32) for name, column in columns.items()}
    return Rows(ids, positions, torch.tensor(index), torch.tensor(targets), **signals)


_SIGNALS = (
    "temperature",
    "behaviour",
    "demonstration",
    "preference",
    "preference_advantage",
    "adversarial",
    "adversarial_advantage",
)


def _signals(s: TrainingSequence) -> dict[str, float | list[float]]:
    return {
        "temperature": s.temperature,
        "behaviour": s.behaviour_logprobs or 0.0,
        "demonstration": float(s.demonstration),
        "preference": float(s.preference_advantage is not None),
        "preference_advantage": s.preference_advantage or 0.0,
        "adversarial": float(s.adversarial_advantage is not None),
        "adversarial_advantage": s.adversarial_advantage or 0.0,
    }


def _no_rows() -> Rows:
    none = torch.zeros(0)
    zero = torch.zeros(1, 1, dtype=torch.long)
    where = torch.zeros(0, dtype=torch.long)
    return Rows(zero, zero.clone(), where, where.clone(), none + 1, *[none] * (len(_SIGNALS) - 1))


def count_tokens(sequences: list[TrainingSequence]) -> Tensor:
    """How many tokens count in each of `TERMS`, [3], float64: the denominators, before the sum over ranks."""
    counts = [0, 0, 0]
    for s in sequences:
        length = len(s.response_ids)
        for i, counted in enumerate(
            (s.demonstration, s.preference_advantage is not None, s.adversarial_advantage is not None)
        ):
            counts[i] += length if counted else 0
    return torch.tensor(counts, dtype=torch.float64)
