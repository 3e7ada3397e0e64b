"""The wire of a CPU weight broadcast: a gloo group and checksummed buckets, the same on both sides.

A bucket is one layer's tensors as bytes, in pieces, the last of which ends with the 8 bytes of their xxh3 checksum.
Every wait ends by a deadline. Who closes its group or its store lets all that wait for it go at once, with an error;
who does not, holds them to their deadlines.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice, pairwise
from threading import Event

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from uniapl.memory import Memory

CHECKSUM_BYTES = 8
BACKLOG = 1024
"""Members whose connections a store may still have to take: they all come at once."""
PIECE_BYTES = 16 << 20
"""A bucket of most models: large enough that a message's own cost, some 0.2 ms, does not count."""
PIECES = 4
"""Of a sender, at most, on the wire or about to be: 64 MiB."""
SHORTEST_WAIT_S = 0.001
"""A wait of 0 would mean one without end to gloo."""

Count = Callable[[int], object]


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

    def __init__(self, group: dist.ProcessGroupGloo, deadline: Deadline, memory: Memory, count: Count) -> None:
        self._group, self._deadline, self._memory, self._count = group, deadline, memory, count
        self._on_wire: deque[tuple[dist.Work, Tensor]] = deque()

    def buffer(self) -> Tensor:
        """[PIECE_BYTES + CHECKSUM_BYTES] uint8, to be filled; waits for the oldest piece where there are enough."""
        if len(self._on_wire) >= PIECES - 1:
            self._finish_oldest()
        return self._memory.take(PIECE_BYTES + CHECKSUM_BYTES)

    def send(self, piece: Tensor) -> None:
        """Begin to send what is in a buffer, or in a part of it."""
        self._on_wire.append((broadcast(self._group, piece, self._deadline), piece))
        self._count(piece.numel())

    def finish(self) -> None:
        while self._on_wire:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        work, _piece = self._on_wire.popleft()
        finish(work)


def send(
    group: dist.ProcessGroupGloo,
    layers: Iterable[list[Tensor]],
    deadline: Deadline,
    digest: xxhash.xxh3_64,
    stop: Event,
    memory: Memory | None = None,
    count: Count = lambda size: None,
) -> None:
    """Broadcast every layer from rank 0 as one bucket.

    It goes in pieces that stay in the processor's cache while they are copied, checksummed and sent; while the last
    of them are on the wire the next layer is gathered.

    Args:
        group: of sender and receivers.
        layers: their tensors, each layer's held until the next one is asked for.
        deadline: of all.
        digest: of all buckets.
        stop: set to end it between two layers.
        memory: for pieces, PIECES of which stay in it; of its own by default.
        count: called with the bytes of every piece that goes onto the wire.

    Raises:
        TransferInterruptedError: stopped, or a receiver is gone, or the deadline is over.
    """
    pipeline = _Pipeline(group, deadline, memory or Memory(), count)
    for tensors in layers:
        if stop.is_set():
            raise TransferInterruptedError("stopped")
        _send_bucket(pipeline, tensors, digest)
    pipeline.finish()


def _send_bucket(pipeline: _Pipeline, tensors: list[Tensor], digest: xxhash.xxh3_64) -> None:
    checksum = xxhash.xxh3_64()
    sizes = piece_sizes(sum(tensor.nbytes for tensor in tensors))
    for number, (piece, length) in enumerate(zip(_pieces(tensors, pipeline.buffer), sizes, strict=True), 1):
        checksum.update(piece[:length].numpy())
        if number == len(sizes):
            piece[length : length + CHECKSUM_BYTES] = torch.frombuffer(bytearray(checksum.digest()), dtype=torch.uint8)
            length += CHECKSUM_BYTES
        pipeline.send(piece[:length])
    digest.update(checksum.digest())


def piece_sizes(size: int) -> list[int]:
    """Bytes of the pieces of a bucket of `size` bytes, without the checksum behind the last one."""
    return [*[PIECE_BYTES] * (size // PIECE_BYTES), size % PIECE_BYTES]


def _pieces(tensors: list[Tensor], buffer: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Buffers with the bytes of `tensors` one after the other: PIECE_BYTES in each, and less in the last one."""
    piece, filled = buffer(), 0
    for tensor in tensors:
        data, at = tensor.detach().contiguous().view(-1).view(torch.uint8), 0
        while at < data.numel():
            length = min(PIECE_BYTES - filled, data.numel() - at)
            piece[filled : filled + length].copy_(data[at : at + length])
            filled, at = filled + length, at + length
            if filled == PIECE_BYTES:
                yield piece
                piece, filled = buffer(), 0
    yield piece


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
    group: dist.ProcessGroupGloo,
    layout: Layout,
    deadline: Deadline,
    digest: xxhash.xxh3_64,
    memory: Memory | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Receive all buckets, two of them on the wire while the tensors of the one before are used.

    Four buckets at most stay in `memory`, which is its own by default, where tensors are not kept; those that are
    keep theirs.

    Raises:
        TransferInterruptedError: the sender or another engine is gone, or the deadline is over.
        TransferError: bytes do not match their checksum.
    """
    memory = memory or Memory()
    ahead = (_Coming(group, layout, bounds, deadline, memory) for bounds in pairwise(layout.bounds))
    coming = deque(islice(ahead, 2))
    while coming:
        bucket = coming.popleft()
        digest.update(bucket.arrive())
        coming.extend(islice(ahead, 1))
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
        lengths = piece_sizes(sum(self._sizes))
        whole = memory.take(sum(lengths) + CHECKSUM_BYTES)
        self._data, self._trailer = whole[:-CHECKSUM_BYTES], whole[-CHECKSUM_BYTES:]
        pieces = whole.split([*lengths[:-1], lengths[-1] + CHECKSUM_BYTES])
        on_wire = [broadcast(group, piece, deadline) for piece in pieces]
        self._on_wire = list(zip(on_wire, self._data.split(lengths), strict=True))

    def arrive(self) -> bytes:
        """Wait for all of it; returns its checksum."""
        checksum = xxhash.xxh3_64()
        for work, piece in self._on_wire:
            finish(work)
            checksum.update(piece.numpy())
        self._on_wire.clear()
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
