"""Stand-ins on both sides of a weight broadcast, so that processes can be killed in every phase within seconds.

The wire, the groups, Ray, the processes, the signals, `EngineClient`, `GlooSender` and `WeightSender` are real. What
stands in: for vLLM's engine, which takes half a minute to start, a dictionary of tensors that is loaded layer by layer
from the real `receive`; for ZeRO-3's gathers a collective of the same kind. `test_weight_broadcast.py` has the same
with vLLM and DeepSpeed, one death in one phase.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from learner.device import local_device
from learner.weight_sender import WeightSender
from learner.weight_source import ParameterMeta, ZeroSource
from uniapl import transfer

LAYERS = 6
SHAPES = [[64, 1024], [1024]]
"""Of every layer's two parameters: a bucket of 260 KiB."""


def weights(version: int, layer: int) -> list[Any]:
    """[64, 1024] and [1024] float32: what the learner has at `version`."""
    draw = torch.Generator().manual_seed(1000 * version + layer)
    return [torch.rand(shape, generator=draw) for shape in SHAPES]


class StandInEngine:
    """The calls that `EngineClient` makes of a rollout actor."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.held: dict[str, Any] = {}
        self.version, self.paused, self._digest = -1, False, ""
        self._group: Any = None
        self._fault, self._phase = 0, ""
        self._wrong_digest = False

    def pid(self) -> int:
        return os.getpid()

    def arm(self, phase: str, fault: int) -> None:
        """Send this process the signal `fault` when it comes to `phase`, once."""
        self._phase, self._fault = phase, fault

    def acknowledge_other_bytes(self) -> None:
        self._wrong_digest = True

    def state(self) -> tuple[int, bool, dict[str, Any]]:
        return self.version, self.paused, {name: tensor.tolist() for name, tensor in self.held.items()}

    def _reach(self, phase: str) -> None:
        if self._phase == phase:
            self._phase = ""
            os.kill(os.getpid(), self._fault)
            time.sleep(0.05)  # the signal may take effect a moment later

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> str:
        self._reach("join")
        self._group = None
        real = dist.ProcessGroupGloo
        if self._phase == "connect":  # after the others know that this one is there, before it connects to them

            def connect(*args: Any) -> Any:
                self._reach("connect")
                return real(*args)

            dist.ProcessGroupGloo = connect  # type: ignore[misc,assignment]
        try:
            host, port = info["master_address"], info["master_port"]
            deadline = transfer.Deadline.after(info["timeout_s"])
            self._group = transfer.join_group(host, port, info["rank_offset"], info["world_size"], deadline)
        except transfer.TransferInterruptedError as error:
            return str(error)
        finally:
            dist.ProcessGroupGloo = real  # type: ignore[misc]
        return ""

    def start_weight_update(self) -> None:
        self._reach("pause")
        self.paused = True

    def update_weights(self, info: dict[str, Any]) -> str:
        layout = transfer.Layout(
            info["names"], [getattr(torch, d) for d in info["dtype_names"]], info["shapes"], info["bounds"]
        )
        digest = xxhash.xxh3_64()
        try:
            for count, (name, tensor) in enumerate(
                transfer.receive(self._group, layout, transfer.Deadline.after(info["timeout_s"]), digest)
            ):
                self.held[name] = tensor
                if count == LAYERS:
                    self._reach("receive")
        except transfer.TransferInterruptedError as error:
            self._group = None
            return str(error)
        self._digest = digest.hexdigest()
        return ""

    def finish_weight_update(self, version: int) -> tuple[int, str]:
        self._reach("load")
        self.version = version
        return version, "other" if self._wrong_digest else self._digest

    def resume(self) -> None:
        self._reach("resume")
        self.paused = False


class StandInRank:
    """One learner rank: a real `WeightSender` over weights whose gathering is a collective of the ranks."""

    def __init__(self, rank: int, ranks: int, rendezvous: str, timeout_s: float) -> None:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
        self.source = VersionSource()
        self.sender = WeightSender(self.source, local_device(0), rank, timeout_s)

    def connect(self, handles: list[Any]) -> Any:
        return self.sender.connect(handles, 1, "127.0.0.1")

    def broadcast(self, version: int) -> tuple[Any, float]:
        """What was sent, and the seconds that it took."""
        self.source.version = version
        began = time.monotonic()
        return self.sender.send(version), time.monotonic() - began

    def pid(self) -> int:
        return os.getpid()

    def stop_in_a_gather(self) -> None:
        """Stop this process when it comes to the middle of the next pass, once."""
        self.source.stops = True

    def threads(self) -> int:
        return sum(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())


class VersionSource(ZeroSource):
    """`ZeroSource` without DeepSpeed: a pass is a row of collectives all the same."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Module(), torch.float32)
        self._layers = [[f"{layer}.matrix", f"{layer}.vector"] for layer in range(LAYERS)]
        self.version = 0
        self.stops = False

    def metadata(self) -> list[ParameterMeta]:
        names = [name for layer in self.layers() for name in layer]
        return [ParameterMeta(n, torch.float32, tuple(SHAPES[i % len(SHAPES)])) for i, n in enumerate(names)]

    def _gather(self) -> Iterator[Any]:
        for number, names in enumerate(self.layers()):
            if self.stops and number == LAYERS // 2:
                self.stops = False
                os.kill(os.getpid(), signal.SIGSTOP)
            dist.barrier()  # a rank that is not in this pass holds the others here
            yield names, weights(self.version, number)


DEATHS = {signal.SIGKILL: "died", signal.SIGSTOP: "within"}
"""What the reason for a loss says of the signal."""
