"""The engine's side of a weight broadcast on CPU: vLLM's weight-transfer backend `gloo`.

vLLM's workers import this module through `worker_extension_cls`, which registers the backend there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from actors.lifeline import end_with_parent
from uniapl.transfer import TransferError, join_group, join_store, receive_bucket

BACKEND = "gloo"


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
    """What is about to be broadcast: parameters in order, cut into buckets at `bounds`."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    bounds: list[int]
    """[buckets + 1]: bucket b holds the parameters bounds[b] .. bounds[b + 1]."""


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives buckets over gloo and loads them as a checkpoint would be."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    group: dist.ProcessGroupGloo | None = None
    digest: str = ""
    """Of all buckets of the last update, to be compared with the sender's."""

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        i = init_info
        store = join_store(i.master_address, i.master_port, i.timeout_s)
        rank = i.rank_offset + self.parallel_config.rank
        self.group = join_group(store, rank, i.world_size, i.timeout_s)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises an accelerator here; gloo's wait() has already done so on a CPU.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        if self.group is None:
            raise TransferError("weights were sent before the engine joined the group")
        group, u, digest = self.group, update_info, xxhash.xxh3_64()
        dtypes = [getattr(torch, name) for name in u.dtype_names]
        self.model.load_weights(
            tensor
            for a, b in pairwise(u.bounds)
            for tensor in receive_bucket(group, u.names[a:b], dtypes[a:b], u.shapes[a:b], digest)
        )
        self.digest = digest.hexdigest()

    def shutdown(self) -> None:
        self.group = None


class WorkerExtension:
    """Methods that vLLM adds to its workers, for `collective_rpc`."""

    weight_transfer_engine: Any

    def received_digest(self) -> str:
        """Checksum over the last update's buckets; empty where the backend has none (nccl)."""
        return getattr(self.weight_transfer_engine, "digest", "")


def register() -> None:
    """Make the backend known to vLLM in this process, once."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "GlooWeightTransferEngine")


register()
end_with_parent()
