"""The learner's side of a weight broadcast on CPU; the peer of actors/weight_receiver.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import torch.distributed as dist
import xxhash
from torch import Tensor

from learner.engine_client import EngineClient
from learner.weight_source import ZeroSource
from uniapl.broadcast_result import BroadcastError
from uniapl.memory import Memory
from uniapl.transfer import (
    Deadline,
    TransferInterruptedError,
    join_group,
    open_store,
    send,
)


class GlooSender:
    """A group of rank 0 and all engines, and updates through it: one bucket per layer.

    Forming it and every update ends within the client's deadlines. After an error it is of no use any more.

    Args:
        source: of the weights.
        client: of the engines.
        address: of this machine.
        timeout_s: for the forming, and for the sending.

    Raises:
        EnginesLostError: an engine did not get into the group.
        BroadcastError: all engines did, but the learner did not.
    """

    def __init__(self, source: ZeroSource, client: EngineClient, address: str, timeout_s: float) -> None:
        self._source, self._client, self._timeout_s = source, client, timeout_s
        self._group: dist.ProcessGroupGloo | None = None
        self._store: dist.TCPStore | None = None
        self._memory = Memory()
        self._gather_began: float | None = None
        client.learner_s = lambda: 0.0
        self._join(address)

    def _join(self, address: str) -> None:
        self._store = open_store(address, self._timeout_s)
        port, deadline = self._store.port, Deadline.after(self._timeout_s)
        info = {"master_address": address, "master_port": port, "rank_offset": 1, "timeout_s": self._timeout_s}
        info["world_size"] = self._client.world_size
        self._client.let_go = self._close_store
        with _beside(lambda: self._client.init_weight_transfer_engine(info)) as joined:
            try:
                self._group = join_group(address, port, 0, self._client.world_size, deadline)
            except TransferInterruptedError as error:
                self._close_store()
                joined.result()
                raise BroadcastError(f"the engines joined a group that the learner could not: {error}") from None
            joined.result()

    def _close_store(self) -> None:
        self._store = None

    def send_weights(self) -> None:
        """Run one update of all engines, from pausing them to their going on with the new weights.

        Raises:
            EnginesLostError: an engine was lost before all had received the weights; the others are paused.
            BroadcastError: the learner's ranks were too late, or could not send.
        """
        self._client.start_weight_update()
        group, self._group = self._group, None
        if group is None:
            raise RuntimeError("the group was closed")
        lost, over, closed = Event(), Event(), Event()

        def let_go() -> None:
            lost.set()
            over.set()
            closed.wait(self._timeout_s)

        before = self._client.seconds["gather"]
        self._client.let_go, self._client.learner_s = let_go, lambda: self._gather_seconds() - before
        with _beside(lambda: self._client.update_weights(self._update_info())) as received:
            received.add_done_callback(lambda _: over.set())
            sent = self._broadcast(group, lost)
            if sent:
                over.wait()
                self._group = None if lost.is_set() else group
            del group  # where it is not kept its connections close, and the engines that wait in it are let go
            closed.set()
            received.result()
        if not sent:
            raise BroadcastError("the engines received weights that the learner could not send")
        self._client.finish_weight_update()

    def _broadcast(self, group: dist.ProcessGroupGloo, lost: Event) -> bool:
        """Send all layers.

        Returns:
            whether all were sent; else an engine was lost or the deadline is over.
        """
        digest = xxhash.xxh3_64()
        try:
            deadline = Deadline.after(self._timeout_s)
            send(group, self._gathered(), deadline, digest, lost, self._memory, self._client.count)
        except TransferInterruptedError:
            return False
        self._client.digest = digest.hexdigest()
        return True

    def _gathered(self) -> Iterator[list[Tensor]]:
        layers = self._source.gather_layers()
        while True:
            self._gather_began = time.monotonic()
            layer = next(layers, None)
            self._client.seconds["gather"], self._gather_began = self._gather_seconds(), None
            if layer is None:
                return
            yield layer[1]

    def _gather_seconds(self) -> float:
        """Of gathering so far, with the layer that is being gathered; asked for in another thread, too."""
        began = self._gather_began
        return self._client.seconds["gather"] + (0.0 if began is None else time.monotonic() - began)

    def _update_info(self) -> dict[str, Any]:
        meta = self._source.metadata()
        bounds = [0]
        for layer in self._source.layers():
            bounds.append(bounds[-1] + len(layer))
        return {
            "names": [m.name for m in meta],
            "dtype_names": [str(m.dtype).removeprefix("torch.") for m in meta],
            "shapes": [list(m.shape) for m in meta],
            "bounds": bounds,
            "timeout_s": self._timeout_s,
        }

    def shutdown(self) -> None:
        self._group = self._store = None


@contextmanager
def _beside(call: Callable[[], None]) -> Iterator[Future[None]]:
    """Runs `call` in a thread while the body runs, and does not wait for it after an error in the body."""
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        yield pool.submit(call)
    finally:
        pool.shutdown(wait=False)
