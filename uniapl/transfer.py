"""The wire of a CPU weight broadcast: a gloo group and checksummed buckets, the same on both sides.

A bucket is one layer's tensors as bytes, followed by the 8 bytes of their xxh3 checksum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

CHECKSUM_BYTES = 8


class TransferError(RuntimeError):
    """A weight transfer that failed: who, in which phase and why."""


def open_store(host: str, timeout_s: float) -> dist.TCPStore:
    """The rendezvous of a new group, on a free port of this machine."""
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join_store(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """The rendezvous that another process opened."""
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def join_group(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> dist.ProcessGroupGloo:
    """A gloo group beside the process's own ones; every operation in it fails after `timeout_s`."""
    return dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, world_size, timedelta(seconds=timeout_s))


def send_bucket(group: dist.ProcessGroupGloo, tensors: Iterable[Tensor], digest: xxhash.xxh3_64) -> int:
    """Broadcast `tensors` from rank 0 as one bucket and add it to `digest`; returns its bytes."""
    data = torch.cat([t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors])
    checksum = xxhash.xxh3_64(data.numpy())
    digest.update(checksum.digest())
    trailer = torch.frombuffer(bytearray(checksum.digest()), dtype=torch.uint8)
    _broadcast(group, torch.cat([data, trailer]))
    return data.numel()


def receive_bucket(
    group: dist.ProcessGroupGloo,
    names: list[str],
    dtypes: list[torch.dtype],
    shapes: list[list[int]],
    digest: xxhash.xxh3_64,
) -> Iterator[tuple[str, Tensor]]:
    """Receive one bucket and cut it into its named tensors.

    Raises:
        TransferError: the bytes do not match their checksum.
    """
    sizes = [torch.Size(s).numel() * d.itemsize for s, d in zip(shapes, dtypes, strict=True)]
    buffer = torch.empty(sum(sizes) + CHECKSUM_BYTES, dtype=torch.uint8)
    _broadcast(group, buffer)
    data, trailer = buffer[:-CHECKSUM_BYTES], buffer[-CHECKSUM_BYTES:]
    checksum = xxhash.xxh3_64(data.numpy()).digest()
    if checksum != trailer.numpy().tobytes():
        raise TransferError(f"checksum of the bucket {names[0]} ... {names[-1]} does not match")
    digest.update(checksum)
    parts = data.split(sizes)
    for name, dtype, shape, part in zip(names, dtypes, shapes, parts, strict=True):
        # A slice need not be aligned for its dtype: copy it out where it is not.
        aligned = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
        yield name, aligned.view(dtype).view(shape)


def _broadcast(group: dist.ProcessGroupGloo, tensor: Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([tensor], options).wait()
