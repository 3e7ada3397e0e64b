"""The learner's side of a weight broadcast on GPUs: vLLM's nccl sender under the deadlines of `EngineClient`.

Its call sequence is tested with a stand-in for nccl; on GPUs it has not been run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future
from threading import Thread
from typing import Any

from torch import Tensor

from learner.engine_client import EngineClient, EnginesLostError
from learner.weight_source import ParameterMeta, ZeroSource
from uniapl.broadcast_result import BroadcastError
from uniapl.device_digest import DeviceDigest


class NcclSender:
    """A group of rank 0 and all engine workers over nccl, and packed updates through it.

    nccl has no deadlines of its own. While it is formed, a group that does not come about within the client's
    deadline leaves a waiting thread behind in this process; later, the communicator is aborted, and an engine whose
    worker stays inside of nccl all the same is cut off with the one that was lost.

    Args:
        source: of the weights.
        client: of the engines.
        address: of this machine.
        timeout_s: for the forming.

    Raises:
        EnginesLostError: an engine did not get into the group.
        BroadcastError: no engine is known to be lost, and the group did not come about.
    """

    def __init__(self, source: ZeroSource, client: EngineClient, address: str, timeout_s: float) -> None:
        self._source, self._client = source, client
        client.let_go = lambda: None  # nothing of nccl's forming can be closed from outside
        before = len(client.members)
        formed: Future[Any] = Future()
        Thread(target=_form, args=(formed, source, client, address), daemon=True).start()
        try:
            self._engine = formed.result(timeout=2 * timeout_s)
        except TimeoutError:
            if len(client.members) < before:
                raise EnginesLostError("an engine did not join the weight group") from None
            raise BroadcastError(f"the nccl group was not formed within {2 * timeout_s:g} s") from None

    def send_weights(self) -> None:
        """Run one update of all engines.

        Raises:
            EnginesLostError: an engine was lost before all had received the weights; the others are paused.
        """
        self._client.let_go = self.shutdown
        self._engine.send_weights()
        self._client.sent_bytes += sum(m.dtype.itemsize * math.prod(m.shape) for m in self._source.metadata())

    def shutdown(self) -> None:
        """Abort the communicator."""
        self._engine.shutdown()


class _Checked:
    """A source whose weights are looked at on their way to vLLM's sender; the engines must acknowledge the checksum."""

    def __init__(self, source: ZeroSource, client: EngineClient) -> None:
        self._source, self._client = source, client

    def metadata(self) -> list[ParameterMeta]:
        return self._source.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        digest = DeviceDigest()
        for name, weight in self._source:
            digest.add(weight)
            yield name, weight
        self._client.digest = digest.hexdigest()


def _form(formed: Future[Any], source: ZeroSource, client: EngineClient, address: str) -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.utils.network_utils import get_open_port

    info = NCCLTrainerInitInfo(address, get_open_port(), client.world_size, rank=0)
    try:
        checked: Any = _Checked(source, client)
        formed.set_result(WeightTransferTrainerFactory.trainer_init(info, client=client, source=checked))
    except Exception as error:  # raised where the result is waited for
        formed.set_exception(error)
