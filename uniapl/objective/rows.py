"""Packed rows: sequences laid end to end, with the loss signals of every target token."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from uniapl.objective.sequences import TrainingSequence

TERMS = ("demonstration", "preference", "adversarial")


@dataclass(frozen=True)
class Row:
    """One packed row. T: its tokens; N: its response tokens, the only ones with a loss.

    `position_ids` restart at every sequence: the model builds a block-diagonal mask from them.
    """

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T]
    index: Tensor  # [N] where in the row the hidden state stands that predicts the target
    targets: Tensor  # [N]
    temperature: Tensor  # [N]
    behaviour: Tensor  # [N] log-probabilities; 0 for demonstrations
    demonstration: Tensor  # [N] 1 for tokens of a demonstration
    preference: Tensor  # [N] 1 for tokens that count in the preference term
    preference_advantage: Tensor  # [N]
    adversarial: Tensor  # [N]
    adversarial_advantage: Tensor  # [N]

    def to(self, device: torch.device | str) -> Row:
        return Row(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def make_row(sequences: list[TrainingSequence]) -> Row:
    """Lay `sequences` end to end. An empty list gives a row of one token that carries no loss."""
    if not sequences:
        return _empty_row()
    tokens: list[int] = []
    positions: list[int] = []
    index: list[int] = []
    columns: dict[str, list[float]] = {name: [] for name in _SIGNALS}
    for sequence in sequences:
        start = len(tokens) + len(sequence.prompt_ids)
        tokens += [*sequence.prompt_ids, *sequence.response_ids]
        positions += range(len(sequence))
        index += range(start - 1, start - 1 + len(sequence.response_ids))
        for name, value in _signals(sequence).items():
            columns[name] += value if isinstance(value, list) else [value] * len(sequence.response_ids)
    where = torch.tensor(index)
    ids = torch.tensor(tokens)
    signals = {name: torch.tensor(column, dtype=torch.float32) for name, column in columns.items()}
    return Row(ids[None], torch.tensor(positions)[None], where, ids[where + 1], **signals)


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


def _empty_row() -> Row:
    none = torch.zeros(0)
    zero = torch.zeros(1, 1, dtype=torch.long)
    where = torch.zeros(0, dtype=torch.long)
    return Row(zero, zero.clone(), where, where.clone(), none + 1, *[none] * (len(_SIGNALS) - 1))


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
