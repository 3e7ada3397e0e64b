"""A checksum of tensors that is computed where they lie: on a GPU only 16 bytes for each of them leave it."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

WORDS = 1 << 22
"""Looked at at a time: their 64-bit copies take 32 MiB."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DeviceDigest:
    """Of tensors in the order in which they come; the same bytes give the same on every device."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, tensor: Tensor) -> None:
        """Look at the next one, in the current stream."""
        self._sums.append(_sums(tensor))

    def hexdigest(self) -> str:
        """Of all so far; waits until they have been looked at."""
        if any(found.is_cuda for found in self._sums):
            torch.cuda.synchronize()  # of every stream that tensors came in
        return xxhash.xxh3_64_hexdigest(b"".join(found.cpu().numpy().tobytes() for found in self._sums))


def _sums(tensor: Tensor) -> Tensor:
    """Fletcher's two sums, modulo 2^64, of a tensor's words: of them all, and of each times its place, from 1."""
    words = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), WORDS):
        part = words[start : start + WORDS].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + part.numel(), device=tensor.device)
        total += torch.stack([part.sum(), (part * places).sum()])
    return total
