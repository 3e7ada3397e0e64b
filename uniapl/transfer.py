"""The wire of a CPU weight broadcast: a gloo group and checksummed buckets, the same on both sides.

A bucket is one layer's tensors as bytes, in pieces, followed by the 8 bytes of their xxh3 checksum. Every wait ends
by a deadline. Who closes its group or its store lets all that wait for it go at once, with an error; who does not,
holds them to their deadlines.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from threading import Event

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from uniapl.pieces import Memory, Part, cut, length

CHECKSUM_BYTES = 8
BACKLOG = 1024
"""Members whose connections a store may still have to take: they all come at once."""
PIECES = 8
"""Of a sender, at most, on the wire or about to be: 32 MiB."""
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


def open_store(host: str, timeout_s: float, port: int = 0) -> dist.TCPStore:
    """The rendezvous of a new group, at `host` alone, by default on a free port; it ends with the object.

    A store that binds by itself listens on all addresses of the machine.

    Raises:
        OSError: `host` is no address of this machine, or `port` is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=BACKLOG) as listener:
        return dist.TCPStore(
            host,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )


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


class _Pipeline:
    """Pieces on the wire, a bounded number."""

    def __init__(self, group: dist.ProcessGroupGloo, deadline: Deadline) -> None:
        self._group, self._deadline = group, deadline
        self._on_wire: deque[tuple[dist.Work, Tensor]] = deque()  # a tensor lives until it was sent
        self.memory = Memory()
        self.sent = 0

    def send(self, piece: Tensor) -> None:
        """Begin to send a piece; waits for the oldest one where there are enough."""
        if len(self._on_wire) >= PIECES:
            self._finish_oldest()
        self._on_wire.append((broadcast(self._group, piece, self._deadline), piece))
        self.sent += piece.numel()

    def _finish_oldest(self) -> None:
        work, _piece = self._on_wire.popleft()
        finish(work)

    def finish(self) -> None:
        while self._on_wire:
            self._finish_oldest()


def send(
    group: dist.ProcessGroupGloo,
    layers: Iterable[list[Tensor]],
    deadline: Deadline,
    digest: xxhash.xxh3_64,
    stop: Event,
) -> int:
    """Broadcast every layer from rank 0 as one bucket.

    It goes in pieces (`uniapl.pieces`) from where its tensors lie; while the last of them are on the wire the next
    layer is gathered.

    Args:
        group: of sender and receivers.
        layers: their tensors, none of which changes before all is sent.
        deadline: of all.
        digest: of all buckets.
        stop: set to end it between two layers.

    Returns:
        bytes sent.

    Raises:
        TransferInterruptedError: stopped, or a receiver is gone, or the deadline is over.
    """
    pipeline = _Pipeline(group, deadline)
    for tensors in layers:
        if stop.is_set():
            raise TransferInterruptedError("stopped")
        _send_bucket(pipeline, tensors, digest)
    pipeline.finish()
    return pipeline.sent


def _send_bucket(pipeline: _Pipeline, tensors: list[Tensor], digest: xxhash.xxh3_64) -> None:
    checksum = xxhash.xxh3_64()
    data = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    for parts in cut([part.numel() for part in data]):
        piece = _joined(parts, data, pipeline.memory)
        checksum.update(piece.numpy())
        pipeline.send(piece)
    digest.update(checksum.digest())
    pipeline.send(torch.frombuffer(bytearray(checksum.digest()), dtype=torch.uint8))


def _joined(parts: list[Part], data: list[Tensor], memory: Memory) -> Tensor:
    """The bytes of a piece: those of one tensor where they lie, several tensors' in memory of their own."""
    found = [data[part.tensor][part.start : part.end] for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found, out=memory.take(length(parts)))


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
    """Receive all buckets, each while the tensors of the one before are used.

    Memory for three buckets suffices where tensors are not kept; those that are keep theirs.

    Raises:
        TransferInterruptedError: the sender or another engine is gone, or the deadline is over.
        TransferError: bytes do not match their checksum.
    """
    buckets, memory = list(pairwise(layout.bounds)), Memory()
    coming = _Coming(group, layout, buckets[0], deadline, memory)
    for number in range(len(buckets)):
        bucket = coming
        digest.update(bucket.arrive())
        if number + 1 < len(buckets):
            coming = _Coming(group, layout, buckets[number + 1], deadline, memory)
        yield from bucket.unpack()


class _Coming:
    """A bucket that is being received."""

    def __init__(
        self,
        group: dist.ProcessGroupGloo,
        layout: Layout,
        bounds: tuple[int, int],
        deadline: Deadline,
        memory: Memory,
    ) -> None:
        self._layout, self._bounds = layout, slice(*bounds)
        self._sizes = layout.sizes(*bounds)
        self._data = memory.take(sum(self._sizes))
        self._trailer = torch.empty(CHECKSUM_BYTES, dtype=torch.uint8)
        pieces = [*self._data.split([length(piece) for piece in cut(self._sizes)]), self._trailer]
        self._on_wire = [(piece, broadcast(group, piece, deadline)) for piece in pieces]

    def arrive(self) -> bytes:
        """Wait for all of it; returns its checksum."""
        checksum = xxhash.xxh3_64()
        for piece, work in self._on_wire:
            finish(work)
            if piece is not self._trailer:
                checksum.update(piece.numpy())
        if checksum.digest() != self._trailer.numpy().tobytes():
            names = self._layout.names[self._bounds]
            raise TransferError(f"checksum of the bucket {names[0]} ... {names[-1]} does not match")
        return checksum.digest()

    def unpack(self) -> Iterator[tuple[str, Tensor]]:
        """Its tensors, which share its memory."""
        at, layout = self._bounds, self._layout
        parts = self._data.split(self._sizes)
        for name, dtype, shape, part in zip(layout.names[at], layout.dtypes[at], layout.shapes[at], parts, strict=True):
            # A slice need not be aligned for its dtype: copy it out where it is not.
            aligned = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
            yield name, aligned.view(dtype).view(shape)
