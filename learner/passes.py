"""Forward and backward passes over this rank's share of a batch, row by row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from uniapl.config import LearnerConfig
from uniapl.objective.objective import rows_loss
from uniapl.objective.rows import Block, Rows, block_tokens, make_rows, share_prompts
from uniapl.objective.sequences import TrainingSequence
from uniapl.objective_config import TERMS, ObjectiveConfig
from uniapl.packing import pack_balanced

MicroBatch = list[list[Block]]
"""The packed rows of one forward and backward pass."""


def packed_micro_batches(sequences: list[TrainingSequence], config: LearnerConfig) -> list[MicroBatch]:
    """This rank's sequences in packed rows, rows of similar length in one micro-batch."""
    blocks = share_prompts(sequences, config.row_tokens, config.share_prompts)
    plan = pack_balanced([block_tokens(block) for block in blocks], config.row_tokens)
    rows = sorted(([blocks[i] for i in row] for row in plan), key=lambda row: -sum(map(block_tokens, row)))
    size = config.micro_batch_rows
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def plan_micro_batches(sequences: list[TrainingSequence], config: LearnerConfig, device: str) -> list[MicroBatch]:
    """Packed micro-batches, as many on every rank: gathering a ZeRO-3 layer needs them all. At least one."""
    batches = packed_micro_batches(sequences, config)
    number = torch.tensor([max(1, len(batches))], device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return batches + [[] for _ in range(int(number.item()) - len(batches))]


@dataclass
class Tally:
    """What the passes found on this rank."""

    sums: dict[str, float] = field(default_factory=dict)
    """Additive over rows and ranks."""
    log_ratios: list[Tensor] = field(default_factory=list)
    """log pi_theta - log pi_behaviour of the sampled tokens."""
    bad: list[str] = field(default_factory=list)
    """Ids of the sequences of which a token's loss in any term is not finite."""

    def add(self, sums: dict[str, float]) -> None:
        for key, value in sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + value


@dataclass(frozen=True)
class Passes:
    """What every pass over a batch needs.

    Attributes:
        engine: the ZeRO-3 engine around the policy; gradients add up in it.
        reference: the engine around the frozen reference; None where no term asks for it.
        objective: of the run.
        counts: [terms], the terms' denominators over the whole batch.
        weights: of the terms in this step.
        device: of this rank.
        start: log-probabilities before the batch's first optimizer step, [response tokens] by the sequence's `id()`: a
            sequence that is missing is put in by its first pass. None: there is one step, which needs none.
    """

    engine: Any
    reference: Any | None
    objective: ObjectiveConfig
    counts: Tensor
    weights: dict[str, float]
    device: str
    start: dict[int, Tensor] | None = None

    def run(
        self,
        batches: list[MicroBatch],
        tally: Tally | None = None,
        terms: tuple[str, ...] = TERMS,
        only: str | None = None,
        entropy: bool = False,
    ) -> None:
        """One forward and one backward per micro-batch. A collective.

        Args:
            batches: as many on every rank.
            tally: takes up the statistics.
            terms: those whose sequences stand in `batches`.
            only: the one term whose gradient is wanted; None: of all `terms` together.
            entropy: also compute the exact entropy of every sampled token.
        """
        for micro_batch in batches:
            rows = make_rows(micro_batch).to(self.device)
            reference = self._reference(rows) if "kl" in terms else None
            logprobs, entropies = self.engine(rows, True) if entropy else (self.engine(rows), None)
            known = (self.objective, reference, self._start(micro_batch, logprobs))
            result = rows_loss(logprobs, rows, self.counts, self._weights(terms), *known)
            loss = result.loss
            if only is not None:
                loss = rows_loss(logprobs, rows, self.counts, self._weights((only,)), *known).loss
            # ZeRO averages gradients over ranks; the counts already span all of them.
            self.engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
            if tally is not None:
                tally.add(result.sums | {"loss/total": result.loss.item()} | row_sizes(micro_batch, rows))
                tally.log_ratios.append(result.log_ratio.cpu())
                tally.bad += _not_finite(micro_batch, rows, result.finite)
                if reference is not None:
                    tally.add({"tokens/reference": result.sums["tokens/sampled"]})
                if entropies is not None:
                    of_samples = (entropies * rows.sampled).sum().item()
                    tally.add({"sum/entropy": of_samples, "tokens/entropy": result.sums["tokens/sampled"]})

    def _start(self, micro_batch: MicroBatch, logprobs: Tensor) -> Tensor | None:
        """The start's log-probabilities of the targets, [N]; these very ones in the first pass."""
        sequences = sequences_of(micro_batch)
        if self.start is None or not sequences:
            return None
        now = logprobs.detach().split([len(s.response_ids) for s in sequences])
        return torch.cat([self.start.setdefault(id(s), part) for s, part in zip(sequences, now, strict=True)])

    def _weights(self, terms: tuple[str, ...]) -> dict[str, float]:
        return {term: weight if term in terms else 0.0 for term, weight in self.weights.items()}

    @torch.no_grad()
    def _reference(self, rows: Rows) -> Tensor | None:
        return None if self.reference is None else self.reference(rows)


def sequences_of(micro_batch: MicroBatch) -> list[TrainingSequence]:
    """In the order of their targets."""
    return [s for row in micro_batch for block in row for s in block]


def row_sizes(micro_batch: MicroBatch, rows: Rows) -> dict[str, float]:
    """Tokens that the rows have room for, padding included, and those of the sequences in them."""
    return {
        "tokens/rows": float(rows.input_ids.numel()),
        "tokens/computed": float(sum(block_tokens(block) for row in micro_batch for block in row)),
    }


def _not_finite(micro_batch: MicroBatch, rows: Rows, finite: Tensor) -> list[str]:
    numbers = rows.sequence[~finite].unique().tolist()
    ids = [s.id for s in sequences_of(micro_batch)] if numbers else []
    return [ids[number] for number in numbers]
