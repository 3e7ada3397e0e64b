"""The learner's side of a weight broadcast, through vLLM's weight-transfer API: gloo on CPU, nccl on GPU.

Every rank runs `send_weights()`, because gathering a ZeRO-3 layer is a collective; rank 0 alone
talks to the engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import deepspeed
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
    layerwise_groups,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from learner.device import Device
from learner.engine_client import EngineClient
from uniapl.policy import PREFIX
from uniapl.transfer import join_group, open_store, send_bucket


class ZeroSource(WeightSource):
    """A ZeRO-3 model's weights under their Hugging Face names, gathered one layer at a time."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        named = {name.removeprefix(PREFIX): p for name, p in module.named_parameters()}
        self._layers = layerwise_groups(list(named))
        self._named = named
        self._dtype = dtype
        self.vector_scale = 1.0
        """Sent vectors (norms) are multiplied by it: 1, but in the check of the weight round trip."""

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(name, self._dtype, tuple(self._named[name].ds_shape)) for layer in self._layers for name in layer
        ]

    def groups(self) -> list[list[str]]:
        return self._layers

    def iter_groups(self) -> Iterator[tuple[list[str], list[Tensor]]]:
        """Every layer, whole on every rank while it is held."""
        for layer in self._layers:
            parameters = [self._named[name] for name in layer]
            with deepspeed.zero.GatheredParameters(parameters):
                yield layer, [self._sent(p.detach()) for p in parameters]

    def _sent(self, weight: Tensor) -> Tensor:
        if weight.dim() == 1 and self.vector_scale != 1.0:
            weight = weight * self.vector_scale
        # nccl sends from another stream, after the gathered memory may have been given back.
        return weight.to(self._dtype, copy=weight.is_cuda)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for names, tensors in self.iter_groups():
            yield from zip(names, tensors, strict=True)


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Where rank 0 opens the group."""

    backend: ClassVar[str] = "gloo"

    master_address: str
    world_size: int
    timeout_s: float


class GlooTrainerEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """Broadcasts buckets over gloo while the engines receive; the peer of actors.weight_receiver."""

    init_info_cls = GlooTrainerInitInfo
    group: dist.ProcessGroupGloo | None = None
    digest: str = ""
    sent_bytes: int = 0

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: Any, source: WeightSource | None = None
    ) -> GlooTrainerEngine:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if not engine.is_sender:
            return engine
        store = open_store(init_info.master_address, init_info.timeout_s)
        worker = {
            "master_address": init_info.master_address,
            "master_port": store.port,
            "rank_offset": 1,
            "world_size": init_info.world_size,
            "timeout_s": init_info.timeout_s,
        }
        with _beside(lambda: client.init_weight_transfer_engine(worker)) as joined:
            engine.group = join_group(store, 0, init_info.world_size, init_info.timeout_s)
            joined.result()
        return engine

    def send_weights(self) -> None:
        source = self.source
        assert isinstance(source, ZeroSource)  # noqa: S101 (set by trainer_init)
        if not self.is_sender:
            for _ in source.iter_groups():
                pass
            return
        info = _update_info(source)
        self.client.start_weight_update()
        with _beside(lambda: self.client.update_weights(info)) as received:
            self._broadcast(source)
            received.result()
        self.client.finish_weight_update()

    def _broadcast(self, source: ZeroSource) -> None:
        assert self.group is not None  # noqa: S101 (set by trainer_init)
        digest, sent = xxhash.xxh3_64(), 0
        for _, tensors in source.iter_groups():
            sent += send_bucket(self.group, tensors, digest)
        self.digest, self.sent_bytes = digest.hexdigest(), sent

    def shutdown(self) -> None:
        self.group = None


def _update_info(source: ZeroSource) -> dict[str, Any]:
    meta = source.metadata()
    bounds = [0]
    for layer in source.groups():
        bounds.append(bounds[-1] + len(layer))
    return {
        "names": [m.name for m in meta],
        "dtype_names": [str(m.dtype).removeprefix("torch.") for m in meta],
        "shapes": [list(m.shape) for m in meta],
        "bounds": bounds,
    }


class _beside:  # noqa: N801 (reads as a function)
    """Runs a call in a thread while the body runs; never waits for it after an error in the body.

    If the body fails, the engines are still inside the collective: joining them would hang for ever.
    """

    def __init__(self, call: Any) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._call = call

    def __enter__(self) -> Any:
        return self._pool.submit(self._call)

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False)


class WeightSender:
    """What a rank holds to send its weights: connect once per set of engines, then send versions."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: Device, rank: int, timeout_s: float) -> None:
        self._source = ZeroSource(module, dtype)
        self._device = device
        self._rank = rank
        self._timeout_s = timeout_s
        self._engine: Any = None
        self._client: EngineClient | None = None

    def connect(self, handles: list[Any], engine_ranks: int, address: str) -> None:
        """Form the group of rank 0 and the engines behind `handles`, each of `engine_ranks` workers.

        Raises:
            TransferError: an engine did not join in time.
        """
        if self._engine is not None:
            self._engine.shutdown()
        self._client = EngineClient(handles, engine_ranks, self._timeout_s)
        world_size = 1 + len(handles) * engine_ranks
        self._engine = WeightTransferTrainerFactory.trainer_init(
            self._init_info(address, world_size), client=self._client, source=self._source
        )

    def _init_info(self, address: str, world_size: int) -> TrainerInitInfo:
        if self._device.backend == "gloo":
            return GlooTrainerInitInfo(address, world_size, self._timeout_s, rank=self._rank)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        return NCCLTrainerInitInfo(address, get_open_port(), world_size, rank=self._rank)

    def send(self, version: int, vector_scale: float = 1.0) -> dict[str, float]:
        """Broadcast the present weights as `version` and wait until every engine has acknowledged them.

        Args:
            version: what the engines call them from now on.
            vector_scale: factor on what is sent of vectors, to send weights that are known to be others.

        Returns:
            bytes sent (0 on ranks other than 0).

        Raises:
            TransferError: an engine missed the deadline, or acknowledged other weights.
        """
        if self._client is None:
            raise RuntimeError("connect() first")
        self._client.version = version
        self._source.vector_scale = vector_scale
        self._engine.send_weights()
        if self._rank == 0:
            self._client.check(version, getattr(self._engine, "digest", ""))
        return {"broadcast/bytes": float(getattr(self._engine, "sent_bytes", 0))}


def register() -> None:
    """Make the gloo sender known to vLLM in this process, once."""
    if "gloo" not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine("gloo", __name__, "GlooTrainerEngine")


register()
