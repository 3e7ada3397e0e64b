"""The wire of a CPU broadcast: a real gloo group of two, checksums, deadlines."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import xxhash

from uniapl.transfer import TransferError, _broadcast, join_group, join_store, open_store, receive_bucket, send_bucket

NAMES, DTYPES, SHAPES = ["a", "b", "c"], [torch.bfloat16, torch.float32, torch.int64], [[3], [2, 2], [1]]
TENSORS = [torch.tensor([1.5, -2.0, 3.0]).bfloat16(), torch.arange(4.0).view(2, 2), torch.tensor([7])]


def pair(timeout_s: float = 20.0) -> tuple:
    """Both ends of a group."""
    store = open_store("127.0.0.1", timeout_s)
    with ThreadPoolExecutor(1) as beside:
        other = beside.submit(lambda: join_group(join_store("127.0.0.1", store.port, timeout_s), 1, 2, timeout_s))
        return join_group(store, 0, 2, timeout_s), other.result(), store


def test_a_bucket_arrives_as_it_was_sent_with_the_same_digest() -> None:
    sender, receiver, _store = pair()
    sent, got = xxhash.xxh3_64(), xxhash.xxh3_64()
    with ThreadPoolExecutor(1) as beside:
        size = beside.submit(send_bucket, sender, TENSORS, sent)
        received = dict(receive_bucket(receiver, NAMES, DTYPES, SHAPES, got))
    assert size.result() == 6 + 16 + 8
    assert sent.hexdigest() == got.hexdigest()
    for name, tensor in zip(NAMES, TENSORS, strict=True):
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)


def test_bytes_that_do_not_match_their_checksum_are_refused() -> None:
    sender, receiver, _store = pair()
    with ThreadPoolExecutor(1) as beside:
        beside.submit(_broadcast, sender, torch.zeros(6 + 16 + 8 + 8, dtype=torch.uint8))
        with pytest.raises(TransferError, match=r"checksum of the bucket a \.\.\. c does not match"):
            list(receive_bucket(receiver, NAMES, DTYPES, SHAPES, xxhash.xxh3_64()))


def test_a_peer_that_never_sends_ends_the_wait_at_the_deadline() -> None:
    _sender, receiver, _store = pair(timeout_s=2.0)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        list(receive_bucket(receiver, NAMES, DTYPES, SHAPES, xxhash.xxh3_64()))
    assert time.monotonic() - began < 20
