"""The wire of a CPU broadcast: a real gloo group of two, checksums, deadlines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import psutil
import pytest
import torch
import xxhash

from uniapl.transfer import (
    CHECKSUM_BYTES,
    PIECE_BYTES,
    PIECES,
    Deadline,
    Layout,
    TransferError,
    TransferInterruptedError,
    broadcast,
    finish,
    join_group,
    open_store,
    receive,
    send,
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


def send_with_a_flaw(group: Any) -> None:
    """Both buckets by hand, the second one not as its checksum says."""
    for number, bucket in enumerate(BUCKETS):
        data = torch.cat([t.view(-1).view(torch.uint8) for t in bucket])
        checksum = torch.frombuffer(bytearray(xxhash.xxh3_64_digest(data.numpy())), dtype=torch.uint8)
        data[3] ^= number
        finish(broadcast(group, torch.cat([data, checksum]), Deadline.after(20)))


def test_buckets_arrive_as_they_were_sent_with_the_same_digest() -> None:
    sender, receiver = pair()
    sent, got = xxhash.xxh3_64(), xxhash.xxh3_64()
    with ThreadPoolExecutor(1) as beside:
        sizes: list[int] = []
        sending = beside.submit(send, sender, BUCKETS, Deadline.after(20), sent, Event(), count=sizes.append)
        received = dict(receive(receiver, LAYOUT, Deadline.after(20), got))
    sending.result()
    assert sizes == [6 + 16 + CHECKSUM_BYTES, 8 + CHECKSUM_BYTES]
    assert sent.hexdigest() == got.hexdigest()
    for name, tensor in zip(LAYOUT.names, TENSORS, strict=True):
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)


def test_buckets_of_many_pieces_arrive_whole() -> None:
    """Pieces that end within a tensor, at its end, and more of them than a sender has buffers."""
    sender, receiver = pair()
    draw = torch.Generator().manual_seed(0)
    sizes = [PIECE_BYTES + 5, 7, PIECE_BYTES - 12, (PIECES + 2) * PIECE_BYTES, 3]
    tensors = [torch.randint(256, (size,), generator=draw, dtype=torch.uint8) for size in sizes]
    layout = Layout([str(i) for i in range(5)], [torch.uint8] * 5, [[size] for size in sizes], [0, 3, 5])
    with ThreadPoolExecutor(1) as beside:
        beside.submit(send, sender, [tensors[:3], tensors[3:]], Deadline.after(20), xxhash.xxh3_64(), Event())
        received = dict(receive(receiver, layout, Deadline.after(20), xxhash.xxh3_64()))
    for number, tensor in enumerate(tensors):
        assert torch.equal(received[str(number)], tensor)


def test_bytes_that_do_not_match_their_checksum_are_refused_and_their_bucket_is_named() -> None:
    sender, receiver = pair()
    digest = xxhash.xxh3_64()
    with ThreadPoolExecutor(1) as beside:
        beside.submit(send_with_a_flaw, sender)
        with pytest.raises(TransferError, match=r"checksum of the bucket c \.\.\. c does not match"):
            list(receive(receiver, LAYOUT, Deadline.after(20), digest))


def test_sending_stops_between_two_buckets() -> None:
    sender, receiver = pair()
    stop = Event()

    def layers() -> Iterator[list[torch.Tensor]]:
        yield BUCKETS[0]
        stop.set()
        yield BUCKETS[1]

    with ThreadPoolExecutor(1) as beside:
        first = beside.submit(next, receive(receiver, LAYOUT, Deadline.after(5), xxhash.xxh3_64()))
        with pytest.raises(TransferInterruptedError, match="stopped"):
            send(sender, layers(), Deadline.after(5), xxhash.xxh3_64(), stop)
        assert first.result()[0] == "a"


def test_the_next_layer_is_gathered_while_the_last_one_is_on_the_wire() -> None:
    """gloo moves no byte before the receiver asks for it, and this one asks after the sender has begun to gather."""
    sender, receiver = pair()
    gathering = Event()

    def layers() -> Iterator[list[torch.Tensor]]:
        yield BUCKETS[0]
        gathering.set()
        yield BUCKETS[1]

    with ThreadPoolExecutor(1) as beside:
        sending = beside.submit(send, sender, layers(), Deadline.after(10), xxhash.xxh3_64(), Event())
        assert gathering.wait(5), "it waited for the first layer to arrive"
        assert len(dict(receive(receiver, LAYOUT, Deadline.after(10), xxhash.xxh3_64()))) == len(TENSORS)
        sending.result()


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


def test_a_store_listens_at_its_own_address_alone() -> None:
    store = open_store(HOST, 60.0)
    ports = {c.laddr.port: c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}
    assert ports[store.port] == HOST
    with pytest.raises(OSError, match="in use"):
        open_store(HOST, 60.0, store.port)


def test_a_group_is_not_formed_without_everyone() -> None:
    store = open_store(HOST, 60.0)
    with pytest.raises(TransferInterruptedError, match="rank 0 of 2 did not get into the group"):
        join_group(HOST, store.port, 0, 2, Deadline.after(0.5))
