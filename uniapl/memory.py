"""Memory for what is received again and again."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

UNUSED = 3
"""References to an array that no tensor uses, as `Memory.take` counts them: its list's, its own, the counter's."""


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
