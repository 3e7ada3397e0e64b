"""A seeded shuffle of [0, n) in constant memory: a keyed Feistel network with cycle walking.

Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

ROUNDS = 6
_MASK = (1 << 64) - 1


def permutation(n: int, *key: int | str) -> Callable[[int], int]:
    """The bijection of [0, n) that belongs to `key`; each call costs a few microseconds, whatever n is.

    Raises:
        ValueError: n is not positive.
    """
    if n <= 0:
        raise ValueError(f"a shuffle of {n} items; allowed: > 0")
    half = max((n - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    keys = _round_keys(key)

    def shuffled(index: int) -> int:
        if not 0 <= index < n:
            raise IndexError(f"{index}; allowed: 0 to {n - 1}")
        while True:  # the network permutes [0, 4**half) < 4n, so the walk ends soon
            left, right = index >> half, index & low
            for round_key in keys:
                left, right = right, left ^ (_mix(right ^ round_key) & low)
            index = (left << half) | right
            if index < n:
                return index

    return shuffled


def _round_keys(key: tuple[int | str, ...]) -> list[int]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]


def _mix(x: int) -> int:
    """The finalizer of splitmix64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
