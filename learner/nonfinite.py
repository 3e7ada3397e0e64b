"""What ends a run whose loss or gradient is not finite, before it can spoil the weights."""

from __future__ import annotations

from typing import Any

NAMED = 8
"""Samples that a message names; the rest is a number."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient of a batch is NaN or infinite; weights and optimizer are as they were.

    Attributes:
        step: the optimizer step that was not made.
        what: "loss" or "gradient".
        ids: of the offending sequences, over all ranks: `prompt/sample` or the demonstration's.
        found_in: what the ids are: of which part of the batch.
        scores: of a cotrained discriminator, which the loss was computed with; as `uniapl.records.expert_scores`.
    """

    def __init__(self, step: int, what: str, ids: list[str], found_in: str) -> None:
        super().__init__(step, what, ids, found_in)  # all of them, so that it travels between processes
        self.step, self.what, self.ids, self.found_in = step, what, ids, found_in
        self.scores: dict[int, list[tuple[float | None, float | None]]] = {}

    def __str__(self) -> str:
        more = f" and {len(self.ids) - NAMED} more" if len(self.ids) > NAMED else ""
        return f"the {self.what} is not finite; {self.found_in}: {', '.join(self.ids[:NAMED])}{more}"


def of_all_ranks(mine: list[str]) -> list[str]:
    """The lists of all ranks as one, in the order of the ranks, each id once. A collective."""
    import torch.distributed as dist  # not above: the driver needs the error alone, without torch

    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return list(dict.fromkeys(name for names in everyone for name in names))
