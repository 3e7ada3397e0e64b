"""The wire of a CPU broadcast: a real gloo group of two, checksums, deadlines."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import xxhash

from uniapl.transfer import (
    CHECKSUM_BYTES,
    Deadline,
    Layout,
    TransferError,
    TransferInterruptedError,
    broadcast,
    finish,
    join_group,
    open_store,
    pack,
    packed_bytes,
    receive,
)

TENSORS = [torch.tensor([1.5, -2.0, 3.0]).bfloat16(), torch.arange(4.0).view(2, 2), torch.tensor([7])]
LAYOUT = Layout(["a", "b", "c"], [t.dtype for t in TENSORS], [list(t.shape) for t in TENSORS], [0, 2, 3])
BUCKETS = [TENSORS[:2], TENSORS[2:]]
HOST = "127.0.0.1"


def pair(timeout_s: float = 20.0) -> tuple[Any, Any]:
    """Both ends of a group."""
    store, deadline = open_store(HOST, timeout_s), Deadline.after(timeout_s)
    with ThreadPoolExecutor(1) as beside:
        other = beside.submit(join_group, HOST, store.port, 1, 2, deadline)
        return join_group(HOST, store.port, 0, 2, deadline), other.result()


def packed(tensors: list[torch.Tensor], digest: xxhash.xxh3_64) -> torch.Tensor:
    return pack(tensors, torch.empty(packed_bytes(tensors), dtype=torch.uint8), digest)


def send(group: Any, buckets: list[torch.Tensor]) -> None:
    for bucket in buckets:
        finish(broadcast(group, bucket, Deadline.after(20)))


def test_buckets_arrive_as_they_were_sent_with_the_same_digest() -> None:
    sender, receiver = pair()
    sent, got = xxhash.xxh3_64(), xxhash.xxh3_64()
    buckets = [packed(bucket, sent) for bucket in BUCKETS]
    assert [b.numel() for b in buckets] == [6 + 16 + CHECKSUM_BYTES, 8 + CHECKSUM_BYTES]
    with ThreadPoolExecutor(1) as beside:
        beside.submit(send, sender, buckets)
        received = dict(receive(receiver, LAYOUT, Deadline.after(20), got))
    assert sent.hexdigest() == got.hexdigest()
    for name, tensor in zip(LAYOUT.names, TENSORS, strict=True):
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)


def test_bytes_that_do_not_match_their_checksum_are_refused_and_their_bucket_is_named() -> None:
    sender, receiver = pair()
    digest = xxhash.xxh3_64()
    buckets = [packed(bucket, digest) for bucket in BUCKETS]
    buckets[1][3] ^= 1
    with ThreadPoolExecutor(1) as beside:
        beside.submit(send, sender, buckets)
        with pytest.raises(TransferError, match=r"checksum of the bucket c \.\.\. c does not match"):
            list(receive(receiver, LAYOUT, Deadline.after(20), digest))


def test_a_sender_that_never_sends_ends_the_wait_at_the_deadline() -> None:
    _sender, receiver = pair()
    began = time.monotonic()
    with pytest.raises(TransferInterruptedError):
        list(receive(receiver, LAYOUT, Deadline.after(1.0), xxhash.xxh3_64()))
    assert 0.9 <= time.monotonic() - began < 15, "the group's own deadline is later"


def test_a_group_that_the_sender_closes_lets_the_receiver_go_at_once() -> None:
    sender, receiver = pair(timeout_s=60.0)
    with ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(list, receive(receiver, LAYOUT, Deadline.after(60), xxhash.xxh3_64()))
        time.sleep(0.2)
        began = time.monotonic()
        del sender
        with pytest.raises(TransferInterruptedError, match="closed"):
            waiting.result()
    assert time.monotonic() - began < 30


def test_a_store_that_is_closed_lets_go_who_waits_to_join() -> None:
    store = open_store(HOST, 60.0)
    with ThreadPoolExecutor(2) as beside:
        joining = [beside.submit(join_group, HOST, store.port, r, 3, Deadline.after(60)) for r in (0, 1)]
        time.sleep(0.5)
        began = time.monotonic()
        del store
        for one in joining:
            with pytest.raises(TransferInterruptedError, match="of 3 did not get into the group"):
                one.result()
    assert time.monotonic() - began < 30


def test_a_group_is_not_formed_without_everyone() -> None:
    store = open_store(HOST, 60.0)
    with pytest.raises(TransferInterruptedError, match="rank 0 of 2 did not get into the group"):
        join_group(HOST, store.port, 0, 2, Deadline.after(0.5))
