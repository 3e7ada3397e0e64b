"""The learner's side of a weight broadcast: gloo on CPU or within one GPU, else vLLM's nccl sender, behind one class.

The engines' side is vLLM's weight-transfer API in both cases; `EngineClient` drives it. Gathering a ZeRO-3 layer is a
collective of all ranks; rank 0 alone talks to the engines, and tells the other ranks whether there is an attempt to
take part in.

On CPU nothing of vLLM is imported here: it would take a rank 13 s of processor time at every start.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist

from learner.device import Device
from learner.engine_client import EngineClient, EnginesLostError
from learner.gloo_sender import GlooSender
from learner.weight_source import ZeroSource
from uniapl.broadcast_result import BroadcastError, Sent

PHASES = ("join", "pause", "gather", "send", "load", "resume")


class Sender(Protocol):
    """A group with the engines, formed; vLLM's trainer engines have these two methods."""

    def send_weights(self) -> None: ...

    def shutdown(self) -> None: ...


class WeightSender:
    """What a rank holds to send its weights: connect once per set of engines, then send versions.

    Args:
        source: of the weights of this rank's model.
        device: of this rank.
        rank: of this process; all but 0 only gather.
        timeout_s: for every phase of a broadcast.
        transport: `gloo` or `nccl`; the ranks' own by default.
    """

    def __init__(
        self, source: ZeroSource, device: Device, rank: int, timeout_s: float, transport: str | None = None
    ) -> None:
        self._source = source
        self._device = device
        self._transport = transport or device.backend
        self._rank = rank
        self._timeout_s = timeout_s
        self._client = EngineClient([], 1, timeout_s)
        self._sender: Sender | None = None
        self._address = ""

    def connect(self, handles: list[Any], engine_ranks: int, address: str) -> Sent:
        """Form the group of rank 0 and the engines behind `handles`, each of `engine_ranks` workers.

        Engines that do not get into it are cut off, one or more at every attempt, until the rest is in. The seconds
        are among those of the next `send`.
        """
        if self._rank != 0:
            return Sent({})
        self._close()
        self._client = EngineClient(handles, engine_ranks, self._timeout_s)
        self._address = address
        self._join()
        return Sent({}, dict(self._client.lost))

    def send(self, version: int, vector_scale: float = 1.0) -> Sent:
        """Send the present weights as `version` to every engine and wait until it has acknowledged them.

        After the loss of an engine the others get all of it again, in a group without it, so there are at most as
        many attempts as engines.

        Args:
            version: what the engines call them from now on.
            vector_scale: factor on what is sent of vectors, to send weights that are known to be others.

        Returns:
            bytes and seconds, and all engines that were cut off since `connect` (on rank 0).

        Raises:
            BroadcastError: the learner itself was too late (on rank 0). The engines are paused until the next `send`.
        """
        self._source.vector_scale = vector_scale
        if self._rank != 0:
            while self._agreed(False):
                self._source.finish_pass()
            return Sent({})
        self._client.version, self._client.digest = version, ""
        attempts = 0
        sent = False
        try:
            while self._agreed(not sent and self._join()) and self._sender:
                attempts += 1
                sent = self._attempt(self._sender)
        except BroadcastError:
            self._agreed(False)  # the other ranks are done with it, too
            raise
        return Sent(self._take_metrics() | {"broadcast/attempts": float(attempts)}, dict(self._client.lost))

    def _attempt(self, sender: Sender) -> bool:
        members = len(self._client.members)
        try:
            sender.send_weights()
        except EnginesLostError:
            self._close()
            self._source.finish_pass()
            return False
        except BroadcastError:
            self._close()
            self._source.finish_pass()
            raise
        self._source.finish_pass()
        if len(self._client.members) < members:  # lost after it had received: the others need no other attempt
            self._close()
        return True

    def _join(self) -> bool:
        """Form the group where there is none; whether there is one now, else no engine is left."""
        while self._sender is None and self._client.members:
            try:
                self._sender = self._gloo() if self._transport == "gloo" else self._nccl()
            except EnginesLostError:
                continue
        return self._sender is not None

    def _agreed(self, attempt: bool) -> bool:
        """Rank 0's word on whether there is an attempt; the other ranks wait for it."""
        word = torch.tensor([int(attempt)], device=self._device.torch_device)
        dist.broadcast(word, src=0)
        return bool(word.item())

    def _close(self) -> None:
        if self._sender is not None:
            self._sender.shutdown()
        self._sender = None

    def _gloo(self) -> Sender:
        return GlooSender(self._source, self._client, self._address, self._timeout_s)

    def _nccl(self) -> Sender:
        from learner.nccl_sender import NcclSender

        return NcclSender(self._source, self._client, self._address, self._timeout_s)

    def _take_metrics(self) -> dict[str, float]:
        """Of all that was done since they were taken last."""
        client = self._client
        taken = {f"broadcast/{phase}_s": client.seconds[phase] for phase in PHASES}
        taken |= {"broadcast/bytes": float(client.sent_bytes), "broadcast/engines": float(len(client.members))}
        client.seconds.clear()
        client.sent_bytes = 0
        return taken
