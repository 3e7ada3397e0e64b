"""What of a batch goes to which learner rank."""

from __future__ import annotations

from uniapl.packing import partition
from uniapl.records import Demonstration, Group

Share = tuple[list[Group], list[Demonstration]]
"""One rank's, in the order of the batch."""


def share_out(groups: list[Group], tokens: list[int], demonstrations: list[Demonstration], ranks: int) -> list[Share]:
    """One share per rank, about as many tokens in each.

    A demonstration goes with the group of its prompt, where there is one, and so shares that group's copy of the prompt
    (`uniapl.objective.rows.share_prompts`).

    Args:
        tokens: of each group.
    """
    costs, items = list(tokens), []
    group_of = {tuple(group.prompt.token_ids): index for index, group in enumerate(groups)}
    for d in demonstrations:
        item = group_of.get(tuple(d.prompt_ids))
        if item is None:
            item = len(costs)
            costs.append(len(d.prompt_ids))
        costs[item] += len(d.response_ids)
        items.append(item)
    rank_of = {item: rank for rank, share in enumerate(partition(costs, ranks)) for item in share}
    return [
        (
            [group for index, group in enumerate(groups) if rank_of[index] == rank],
            [d for item, d in zip(items, demonstrations, strict=True) if rank_of[item] == rank],
        )
        for rank in range(ranks)
    ]
