"""The engine's side of a weight broadcast on CPU, or within one GPU: vLLM's weight-transfer backend `gloo`.

vLLM's workers import this module through `worker_extension_cls`, which registers it and that between GPUs there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from actors.lifeline import end_with_parent
from uniapl.memory import Memory
from uniapl.transfer import Deadline, Layout, TransferError, TransferInterruptedError, join_group, receive

BACKEND = "gloo"
NCCL_BACKEND = "checked_nccl"


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the learner's group is, and this engine's place in it."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What is about to be broadcast; see `uniapl.transfer.Layout`."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    bounds: list[int]
    timeout_s: float
    """For all of it."""

    def layout(self) -> Layout:
        return Layout(self.names, [getattr(torch, name) for name in self.dtype_names], self.shapes, self.bounds)


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives buckets over gloo and loads them as a checkpoint would be."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    group: dist.ProcessGroupGloo | None = None
    digest: str = ""
    """Of all buckets of the last update, to be compared with the sender's."""

    memory: Memory
    """What buckets are received in."""

    interruption: str = ""
    """Why the last call ended early through no fault of this engine; else empty."""

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        i = init_info
        self.group, self.interruption, self.memory = None, "", Memory()
        rank = i.rank_offset + self.parallel_config.rank
        try:
            deadline = Deadline.after(i.timeout_s)
            self.group = join_group(i.master_address, i.master_port, rank, i.world_size, deadline)
        except TransferInterruptedError as error:
            self.interruption = str(error)
            raise

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises an accelerator, and fails where there is none.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        if self.group is None:
            raise TransferError("weights were sent before the engine joined the group")
        u, digest = update_info, xxhash.xxh3_64()
        self.interruption = ""
        try:
            coming = receive(self.group, u.layout(), Deadline.after(u.timeout_s), digest, self.memory)
            self.model.load_weights(coming)
        except BaseException as error:
            # Closing the connections lets the learner and the other engines go, which may wait for this one.
            self.group = None
            self.interruption = str(error) if isinstance(error, TransferInterruptedError) else ""
            raise
        self.digest = digest.hexdigest()

    def shutdown(self) -> None:
        self.group = None


def abort_layerwise_reload(model: nn.Module, model_config: Any) -> None:
    """Undo vLLM's `initialize_layerwise_reload` on every layer that has not got all of its weights.

    The layers then hold old or new weights, each as a whole: the model must not be used before the next update is
    finished. vLLM knows no such call: a next `initialize_layerwise_reload` would pass over these layers, count twice
    what had come for them, and load them half.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            _place_kernel_tensors(layer, info)
            info.reset()
    finalize_layerwise_reload(model, model_config)


class WorkerExtension:
    """Methods that vLLM adds to its workers, for `collective_rpc`."""

    weight_transfer_engine: Any
    _weight_update_active: bool

    def received_digest(self) -> str:
        """Checksum over the last update's buckets."""
        return str(self.weight_transfer_engine.digest)

    def interruption(self) -> str:
        """Why the last weight transfer ended early through no fault of this engine; else empty."""
        return getattr(self.weight_transfer_engine, "interruption", "")

    def abort_weight_update(self) -> None:
        """Close an update that was begun and not finished."""
        engine = self.weight_transfer_engine
        abort_layerwise_reload(engine.model, engine.model_config)
        self._weight_update_active = False


def register() -> None:
    """Make the backends known to vLLM in this process, once."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "GlooWeightTransferEngine")
        WeightTransferEngineFactory.register_engine(NCCL_BACKEND, "actors.nccl_receiver", "CheckedNcclEngine")


register()
end_with_parent()  # in the spawned process of every worker, once it knows its parent
