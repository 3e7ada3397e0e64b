"""Texts of similar length together, in padded batches of a token budget."""

from __future__ import annotations


def padded_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices by length, as many together as fit `budget` tokens when padded to the longest of them.

    What is longer than the budget is alone.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
