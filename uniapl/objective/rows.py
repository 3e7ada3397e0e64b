"""Packed rows: sequences laid end to end, with the loss signals of every target token.

Sequences with the same prompt may stand as one block: the prompt once, then every response, each seeing
the prompt and itself. The prompt of a group is then computed once instead of once per sample.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from uniapl.objective.sequences import TermShare, TrainingSequence
from uniapl.objective_config import TERMS

Block = list[TrainingSequence]
"""Sequences that share one copy of their prompt; usually of one."""
WIDTH_STEP = 32
"""Rows are padded to a multiple of it: for every new shape a CPU's kernels are made anew, and kept in memory."""


@dataclass(frozen=True)
class Rows:
    """B packed rows of T tokens, the shorter ones padded. N: response tokens, the only ones with a loss."""

    input_ids: Tensor  # [B, T]
    position_ids: Tensor  # [B, T]; restart at every block, go on after the prompt for each of its responses
    owner: Tensor  # [B, T] number of the block in its row; -1: padding
    segments: Tensor  # [B, T] 0: the block's prompt; 1, 2, ...: its responses
    shared: bool  # whether any prompt has more than one response
    index: Tensor  # [N] where in the B * T tokens the hidden state stands that predicts the target
    targets: Tensor  # [N]
    temperature: Tensor  # [N]
    behaviour: Tensor  # [N] log-probabilities; 0 for demonstrations
    sampled: Tensor  # [N] 1 for tokens that a rollout engine drew, 0 for those of demonstrations
    demonstration: Tensor  # [N] the token's weight in the term's sum, 0 where it does not count; so are the next ones
    preference: Tensor  # [N]
    preference_advantage: Tensor  # [N]
    adversarial: Tensor  # [N]
    adversarial_advantage: Tensor  # [N]
    kl: Tensor  # [N]
    sequence: Tensor  # [N] int64, number of the sequence within these rows; none stands in two rows

    def to(self, device: torch.device | str) -> Rows:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rows(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()})


def share_prompts(sequences: list[TrainingSequence], row_tokens: int, share: bool) -> list[Block]:
    """Sequences of one prompt as blocks of at most `row_tokens`: a group's samples, and demonstrations of its prompt.

    Args:
        share: without it every sequence is a block of its own.
    """
    blocks: list[Block] = []
    latest: dict[tuple[int, ...], Block] = {}  # by prompt
    for s in sequences:
        prompt = tuple(s.prompt_ids)
        block = latest.get(prompt) if share else None
        if block and block_tokens(block) + len(s.response_ids) <= row_tokens:
            block.append(s)
        else:
            blocks.append([s])
            latest[prompt] = blocks[-1]
    return blocks


def block_tokens(block: Block) -> int:
    """What a block takes of a row."""
    return len(block[0].prompt_ids) + sum(len(s.response_ids) for s in block)


def make_rows(rows: list[list[Block]]) -> Rows:
    """Lay the blocks of every row end to end. Without any there is one token that carries no loss.

    Targets, and so the log-probabilities of a forward pass, stand in the order of the sequences.
    """
    width = max([sum(map(block_tokens, row)) for row in rows], default=0)
    if width == 0:
        return _no_rows()
    layout = _Layout(len(rows), -(-width // WIDTH_STEP) * WIDTH_STEP)
    for b, row in enumerate(rows):
        at = 0
        for number, block in enumerate(row):
            layout.place(block, number, b, at)
            at += block_tokens(block)
    return layout.finish(shared=any(len(block) > 1 for row in rows for block in row))


class _Layout:
    """Rows while they are being filled; see `Rows`."""

    def __init__(self, rows: int, width: int) -> None:
        self.width = width
        self.ids = torch.zeros(rows, width, dtype=torch.long)
        self.positions = torch.zeros_like(self.ids)
        self.owner = -torch.ones_like(self.ids)
        self.segments = torch.zeros_like(self.ids)
        self.index: list[int] = []
        self.targets: list[int] = []
        self.columns: dict[str, list[float]] = {name: [] for name in _SIGNALS}
        self.sequence: list[int] = []
        self.sequences = 0

    def place(self, block: Block, number: int, b: int, at: int) -> None:
        """Put `block`, the row's `number`-th, into row `b` from token `at` on."""
        prompt = len(block[0].prompt_ids)
        self.owner[b, at : at + block_tokens(block)] = number
        self.ids[b, at : at + prompt] = torch.tensor(block[0].prompt_ids)
        self.positions[b, at : at + prompt] = torch.arange(prompt)
        last_of_prompt, start = b * self.width + at + prompt - 1, at + prompt
        for segment, s in enumerate(block, start=1):
            n = len(s.response_ids)
            here = slice(start, start + n)
            self.ids[b, here] = torch.tensor(s.response_ids)
            self.positions[b, here] = torch.arange(prompt, prompt + n)
            self.segments[b, here] = segment
            first = b * self.width + start
            self.index += [last_of_prompt, *range(first, first + n - 1)]
            self.targets += s.response_ids
            for name, value in _signals(s).items():
                self.columns[name] += value if isinstance(value, list) else [value] * n
            self.sequence += [self.sequences] * n
            self.sequences += 1
            start += n

    def finish(self, shared: bool) -> Rows:
        signals = {name: torch.tensor(column, dtype=torch.float32) for name, column in self.columns.items()}
        index, targets, sequence = (
            torch.tensor(column, dtype=torch.long) for column in (self.index, self.targets, self.sequence)
        )
        tokens = (self.ids, self.positions, self.owner, self.segments, shared)
        return Rows(*tokens, index, targets, **signals, sequence=sequence)


_SIGNALS = (
    "temperature",
    "behaviour",
    "sampled",
    "demonstration",
    "preference",
    "preference_advantage",
    "adversarial",
    "adversarial_advantage",
    "kl",
)
_ABSENT = TermShare(token_weight=0.0, count=0.0)


def _signals(s: TrainingSequence) -> dict[str, float | list[float]]:
    shares = {term: s.terms.get(term, _ABSENT) for term in TERMS}
    return {
        "temperature": s.temperature,
        "behaviour": s.behaviour_logprobs or 0.0,
        "sampled": float(s.sampled),
        **{term: share.token_weight for term, share in shares.items()},
        "preference_advantage": shares["preference"].advantage,
        "adversarial_advantage": shares["adversarial"].advantage,
    }


def _no_rows() -> Rows:
    zero, where = torch.zeros(1, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    signals = {name: torch.zeros(0) for name in _SIGNALS}
    tokens = (zero, zero.clone(), zero - 1, zero.clone(), False)
    return Rows(*tokens, where, where.clone(), **signals, sequence=where.clone())


def count_terms(sequences: list[TrainingSequence]) -> Tensor:
    """The denominator of each of `TERMS`, [len(TERMS)], float64, before the sum over ranks."""
    counts = [sum(s.terms.get(term, _ABSENT).count for s in sequences) for term in TERMS]
    return torch.tensor(counts, dtype=torch.float64)
