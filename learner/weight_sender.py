"""The learner's side of a weight broadcast: gloo on CPU, vLLM's own nccl sender on GPU, behind one class.

The engines' side is vLLM's weight-transfer API in both cases; `EngineClient` drives it. Every rank runs
`send_weights()`, because gathering a ZeRO-3 layer is a collective; rank 0 alone talks to the engines.

On CPU nothing of vLLM is imported here: it would take a rank 13 s of processor time at every start.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from learner.device import Device
from learner.engine_client import EngineClient
from uniapl.broadcast_result import Sent
from uniapl.policy import PREFIX
from uniapl.transfer import join_group, open_store, send_bucket


@dataclass(frozen=True)
class ParameterMeta:
    """What vLLM's senders want to know of a parameter before it is gathered."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class ZeroSource:
    """A ZeRO-3 model's weights under their Hugging Face names, gathered one layer at a time.

    Has the methods of vLLM's `WeightSource` that its nccl sender calls: `metadata` and iteration.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        named = {name.removeprefix(PREFIX): p for name, p in module.named_parameters()}
        self._layers = by_layer(list(named))
        self._named = named
        self._dtype = dtype
        self.vector_scale = 1.0
        """Sent vectors (norms) are multiplied by it: 1, but in the check of the weight round trip."""

    def metadata(self) -> list[ParameterMeta]:
        return [
            ParameterMeta(name, self._dtype, tuple(self._named[name].ds_shape))
            for layer in self._layers
            for name in layer
        ]

    def layers(self) -> list[list[str]]:
        """Parameter names, layer by layer, in the order of sending."""
        return self._layers

    def gather_layers(self) -> Iterator[tuple[list[str], list[Tensor]]]:
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
        for names, tensors in self.gather_layers():
            yield from zip(names, tensors, strict=True)


def by_layer(names: list[str]) -> list[list[str]]:
    """Neighbouring names with the same first number (`model.layers.3.`) together; the others by themselves."""
    layers: list[list[str]] = []
    previous: str | None = None
    for name in names:
        found = re.match(r".*?\.\d+\.", name)
        key = found.group() if found else None
        if key is not None and key == previous:
            layers[-1].append(name)
        else:
            layers.append([name])
        previous = key
    return layers


class Sender(Protocol):
    """What `WeightSender` needs of a backend; vLLM's trainer engines have it."""

    def send_weights(self) -> None: ...

    def shutdown(self) -> None: ...


class GlooSender:
    """Broadcasts one bucket per layer over gloo while the engines receive; the peer of actors.weight_receiver.

    Args:
        source: of the weights.
        client: of the engines.
        rank: of this process; all but 0 only gather.
        address: of this machine.
        world_size: rank 0 and all engine workers.
        timeout_s: for every operation.
    """

    def __init__(
        self, source: ZeroSource, client: EngineClient, rank: int, address: str, world_size: int, timeout_s: float
    ) -> None:
        self._source = source
        self._client = client
        self._group: dist.ProcessGroupGloo | None = None
        self.digest = ""
        self.sent_bytes = 0
        if rank == 0:
            self._join(address, world_size, timeout_s)

    def _join(self, address: str, world_size: int, timeout_s: float) -> None:
        store = open_store(address, timeout_s)
        info = {
            "master_address": address,
            "master_port": store.port,
            "rank_offset": 1,
            "world_size": world_size,
            "timeout_s": timeout_s,
        }
        with _beside(lambda: self._client.init_weight_transfer_engine(info)) as joined:
            self._group = join_group(store, 0, world_size, timeout_s)
            joined.result()

    def send_weights(self) -> None:
        """Run one update of all engines, from pausing them to their acknowledgement."""
        if self._group is None:
            for _ in self._source.gather_layers():
                pass
            return
        info = _update_info(self._source)
        self._client.start_weight_update()
        with _beside(lambda: self._client.update_weights(info)) as received:
            self._broadcast(self._group)
            received.result()
        self._client.finish_weight_update()

    def _broadcast(self, group: dist.ProcessGroupGloo) -> None:
        digest, sent = xxhash.xxh3_64(), 0
        for _, tensors in self._source.gather_layers():
            sent += send_bucket(group, tensors, digest)
        self.digest, self.sent_bytes = digest.hexdigest(), sent

    def shutdown(self) -> None:
        self._group = None


def _update_info(source: ZeroSource) -> dict[str, Any]:
    meta = source.metadata()
    bounds = [0]
    for layer in source.layers():
        bounds.append(bounds[-1] + len(layer))
    return {
        "names": [m.name for m in meta],
        "dtype_names": [str(m.dtype).removeprefix("torch.") for m in meta],
        "shapes": [list(m.shape) for m in meta],
        "bounds": bounds,
    }


@contextmanager
def _beside(call: Callable[[], None]) -> Iterator[Future[None]]:
    """Runs `call` in a thread while the body runs; never waits for it after an error in the body.

    If the body fails, the engines are still inside the collective: joining them would hang for ever.
    """
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        yield pool.submit(call)
    finally:
        pool.shutdown(wait=False)


class WeightSender:
    """What a rank holds to send its weights: connect once per set of engines, then send versions."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: Device, rank: int, timeout_s: float) -> None:
        self._source = ZeroSource(module, dtype)
        self._device = device
        self._rank = rank
        self._timeout_s = timeout_s
        self._engine: Sender | None = None
        self._client: EngineClient | None = None

    def connect(self, handles: list[Any], engine_ranks: int, address: str) -> Sent:
        """Form the group of rank 0 and the engines behind `handles`, each of `engine_ranks` workers.

        Raises:
            TransferError: an engine did not join in time.
        """
        if self._engine is not None:
            self._engine.shutdown()
        self._client = EngineClient(handles, engine_ranks, self._timeout_s)
        world_size = 1 + len(handles) * engine_ranks
        open_sender = self._gloo if self._device.backend == "gloo" else self._nccl
        self._engine = open_sender(self._client, address, world_size)
        return Sent({})

    def _gloo(self, client: EngineClient, address: str, world_size: int) -> Sender:
        return GlooSender(self._source, client, self._rank, address, world_size, self._timeout_s)

    def _nccl(self, client: EngineClient, address: str, world_size: int) -> Sender:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        info = NCCLTrainerInitInfo(address, get_open_port(), world_size, rank=self._rank)
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source)

    def send(self, version: int, vector_scale: float = 1.0) -> Sent:
        """Broadcast the present weights as `version` and wait until every engine has acknowledged them.

        Args:
            version: what the engines call them from now on.
            vector_scale: factor on what is sent of vectors, to send weights that are known to be others.

        Returns:
            bytes sent (0 on ranks other than 0).

        Raises:
            TransferError: an engine missed the deadline, or acknowledged other weights.
        """
        if self._client is None or self._engine is None:
            raise RuntimeError("connect() first")
        self._client.version = version
        self._source.vector_scale = vector_scale
        self._engine.send_weights()
        if self._rank == 0:
            self._client.check(version, getattr(self._engine, "digest", ""))
        return Sent({"broadcast/bytes": float(getattr(self._engine, "sent_bytes", 0))})
