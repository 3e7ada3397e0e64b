"""Sequences into rows of a token budget, and items onto ranks, balanced by tokens.

All functions take lengths or costs in tokens and return indices into them. They are deterministic:
the same lengths give the same rows on every machine.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort


def partition(costs: list[int], ranks: int) -> list[list[int]]:
    """Spread items over ranks so that the largest sum of costs is small (longest processing time first).

    Returns:
        One ascending list of indices per rank; some are empty when there are fewer items than ranks.

    Raises:
        ValueError: `ranks` < 1.
    """
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; allowed: >= 1")
    loads = [(0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in _longest_first(costs):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return [sorted(share) for share in shares]


def pack(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """Few rows of at most `row_tokens` that hold every sequence once (best-fit decreasing).

    At most 11/9 of the fewest possible rows, plus 2/3.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    _check(lengths, row_tokens)
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for index in _longest_first(lengths):
        at = bisect_left(room, (lengths[index], -1))
        left, row = room.pop(at) if at < len(room) else (row_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return [sorted(row) for row in rows]


def pack_balanced(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """As many rows as `pack` makes, of even length: a row costs what it holds, so the longest one counts.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    fewest = pack(lengths, row_tokens)
    rows = len(fewest)
    if not rows:
        return []
    best = fewest
    low, high = max([-(-sum(lengths) // rows), *lengths]), longest_row(lengths, fewest)
    while low < high:  # the smallest budget that still gives this many rows (the MULTIFIT heuristic)
        middle = (low + high) // 2
        tried = pack(lengths, middle)
        if len(tried) <= rows:
            best, high = tried, middle
        else:
            low = middle + 1
    best = min(best, partition(lengths, rows), key=lambda found: longest_row(lengths, found))
    return best + [[] for _ in range(rows - len(best))]


def longest_row(lengths: list[int], rows: list[list[int]]) -> int:
    """Tokens in the longest row; 0 without rows."""
    return max((sum(lengths[index] for index in row) for row in rows), default=0)


def _longest_first(lengths: list[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def _check(lengths: list[int], row_tokens: int) -> None:
    for index, length in enumerate(lengths):
        if not 0 <= length <= row_tokens:
            raise ValueError(f"sequence {index} has {length} tokens; allowed: 0 to {row_tokens}, one row")
