"""How a bucket of weights is cut into pieces for the wire, and memory for buckets that is used again."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PIECE_BYTES = 4 << 20
"""At most: a piece stays in the processor's cache while it is checksummed and sent."""
JOINED_BYTES = 1 << 20
"""Tensors that are smaller share a piece, into which they are copied: a message costs as much as some 100 kB."""
UNUSED = 3
"""References to an array that no tensor uses, as `Memory.take` counts them: its list's, its own, the counter's."""


@dataclass(frozen=True)
class Part:
    """Bytes start .. end of one tensor of a bucket."""

    tensor: int
    start: int
    end: int


def cut(sizes: list[int]) -> list[list[Part]]:
    """The pieces of a bucket: each a part of one tensor, or several small tensors.

    Args:
        sizes: bytes of the bucket's tensors, in order.

    Returns:
        pieces of at most `PIECE_BYTES`, one after the other the bytes of the bucket; none is empty.
    """
    pieces: list[list[Part]] = []
    room = 0  # for a further small tensor in the last piece
    for number, size in enumerate(sizes):
        if size < JOINED_BYTES and 0 < size <= room:
            pieces[-1].append(Part(number, 0, size))
            room -= size
        elif size:
            starts = range(0, size, PIECE_BYTES)
            pieces += [[Part(number, start, min(start + PIECE_BYTES, size))] for start in starts]
            room = PIECE_BYTES - size if size < JOINED_BYTES else 0
    return pieces


def length(piece: list[Part]) -> int:
    """Bytes of a piece."""
    return sum(part.end - part.start for part in piece)


class Memory:
    """Memory for buckets, used again when no tensor refers to it any more.

    New memory costs more than all that is done to the bytes that are written there: the system clears it first.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def take(self, size: int) -> Tensor:
        """[size] uint8, with anything in it."""
        for array in self._arrays:
            if array.nbytes >= size and sys.getrefcount(array) == UNUSED:
                return torch.from_numpy(array)[:size]
        self._arrays.append(np.empty(size, np.uint8))
        return torch.from_numpy(self._arrays[-1])
