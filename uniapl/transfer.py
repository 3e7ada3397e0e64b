"""The wire of a CPU weight broadcast: a gloo group and checksummed buckets, the same on both sides.

A bucket is one layer's tensors as bytes, followed by the 8 bytes of their xxh3 checksum. Every wait ends by a
deadline. Who closes its group or its store lets all that wait for it go at once, with an error; who does not, holds
them to their deadlines.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

CHECKSUM_BYTES = 8
SHORTEST_WAIT_S = 0.001
"""A wait of 0 would mean one without end to gloo."""


class TransferError(RuntimeError):
    """A weight transfer that failed: who, in which phase and why."""


class TransferInterruptedError(TransferError):
    """A transfer that ended because the other side, or another engine, was gone: no fault of who reports it."""


@dataclass(frozen=True)
class Deadline:
    """A moment that several waits share."""

    end: float
    """By `time.monotonic()`."""

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def left(self) -> timedelta:
        """What is left of it, never nothing."""
        return timedelta(seconds=max(SHORTEST_WAIT_S, self.end - time.monotonic()))


def open_store(host: str, timeout_s: float) -> dist.TCPStore:
    """The rendezvous of a new group, on a free port of this machine; it ends with the object."""
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join_group(host: str, port: int, rank: int, world_size: int, deadline: Deadline) -> dist.ProcessGroupGloo:
    """Meet the others of a group beside the process's own ones, at the store that `open_store` made.

    Rank 0 comes last: no one connects to anyone before all are there, so that one that is not holds nobody inside
    of gloo, where only its own timeout ends a wait.

    Raises:
        TransferInterruptedError: the store was closed, or somebody did not come before the deadline.
    """
    try:
        store = dist.PrefixStore("weights", dist.TCPStore(host, port, is_master=False, timeout=deadline.left()))
        if rank == 0:
            store.wait([_here(other) for other in range(1, world_size)], deadline.left())
        else:
            store.set(_here(rank), "")
        return dist.ProcessGroupGloo(store, rank, world_size, deadline.left())
    except RuntimeError as error:
        raise TransferInterruptedError(
            f"rank {rank} of {world_size} did not get into the group: {_line(error)}"
        ) from None


def _here(rank: int) -> str:
    return f"here/{rank}"


def broadcast(group: dist.ProcessGroupGloo, tensor: Tensor, deadline: Deadline) -> dist.Work:
    """Begin to broadcast `tensor` from rank 0; `finish` waits for it."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    options.timeout = deadline.left()
    return group.broadcast([tensor], options)


def finish(work: dist.Work) -> None:
    """Wait for an operation of the group.

    Raises:
        TransferInterruptedError: a member is gone, or the deadline is over.
    """
    try:
        work.wait()
    except RuntimeError as error:
        raise TransferInterruptedError(_line(error)) from None


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200]


def pack(tensors: list[Tensor], buffer: Tensor, digest: xxhash.xxh3_64) -> Tensor:
    """Write `tensors` and their checksum into `buffer`, and the checksum into `digest`.

    Args:
        tensors: of one bucket, on any device.
        buffer: [bytes] uint8, at least `packed_bytes(tensors)` long.
        digest: of all buckets so far.

    Returns:
        the part of `buffer` that was written.
    """
    at = 0
    for tensor in tensors:
        source = tensor.detach().contiguous().view(-1).view(torch.uint8)
        buffer[at : at + source.numel()].copy_(source)
        at += source.numel()
    checksum = xxhash.xxh3_64_digest(buffer[:at].numpy())
    digest.update(checksum)
    buffer[at : at + CHECKSUM_BYTES] = torch.frombuffer(bytearray(checksum), dtype=torch.uint8)
    return buffer[: at + CHECKSUM_BYTES]


def packed_bytes(tensors: list[Tensor]) -> int:
    """Bytes of a bucket on the wire."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + CHECKSUM_BYTES


@dataclass(frozen=True)
class Layout:
    """What is about to be broadcast: parameters in order, cut into buckets at `bounds`."""

    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[list[int]]
    bounds: list[int]
    """[buckets + 1]: bucket b holds the parameters bounds[b] .. bounds[b + 1]."""

    def sizes(self, start: int, end: int) -> list[int]:
        """Bytes of the parameters start .. end."""
        pairs = zip(self.shapes[start:end], self.dtypes[start:end], strict=True)
        return [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in pairs]


def receive(
    group: dist.ProcessGroupGloo, layout: Layout, deadline: Deadline, digest: xxhash.xxh3_64
) -> Iterator[tuple[str, Tensor]]:
    """Receive all buckets, each while the tensors of the one before are used; at most two are held here.

    Raises:
        TransferInterruptedError: the sender or another engine is gone, or the deadline is over.
        TransferError: bytes do not match their checksum.
    """
    buckets = list(pairwise(layout.bounds))

    def begin(number: int) -> tuple[Tensor, dist.Work]:
        buffer = torch.empty(sum(layout.sizes(*buckets[number])) + CHECKSUM_BYTES, dtype=torch.uint8)
        return buffer, broadcast(group, buffer, deadline)

    coming = begin(0)
    for number, (start, end) in enumerate(buckets):
        buffer, work = coming
        finish(work)
        if number + 1 < len(buckets):
            coming = begin(number + 1)
        yield from _unpack(buffer, layout, start, end, digest)


def _unpack(
    buffer: Tensor, layout: Layout, start: int, end: int, digest: xxhash.xxh3_64
) -> Iterator[tuple[str, Tensor]]:
    names = layout.names[start:end]
    data, trailer = buffer[:-CHECKSUM_BYTES], buffer[-CHECKSUM_BYTES:]
    checksum = xxhash.xxh3_64_digest(data.numpy())
    if checksum != trailer.numpy().tobytes():
        raise TransferError(f"checksum of the bucket {names[0]} ... {names[-1]} does not match")
    digest.update(checksum)
    parts = data.split(layout.sizes(start, end))
    for name, dtype, shape, part in zip(names, layout.dtypes[start:end], layout.shapes[start:end], parts, strict=True):
        # A slice need not be aligned for its dtype: copy it out where it is not.
        aligned = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
        yield name, aligned.view(dtype).view(shape)
