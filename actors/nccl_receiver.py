"""The engine's side of a weight broadcast between GPUs: vLLM's nccl backend, with a checksum of what has come.

vLLM's workers find it through actors/weight_receiver.py. On GPUs it has not been run.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo

from uniapl.device_digest import DeviceDigest


class CheckedNcclEngine(NCCLWeightTransferEngine):
    """Looks at every bucket of weights before the model loads it."""

    digest: str = ""
    """Of all weights of the last update, to be compared with the sender's."""

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        found, load = DeviceDigest(), self.model.load_weights
        self.digest = ""

        def look_and_load(weights: Iterable[tuple[str, Tensor]]) -> object:
            bucket = list(weights)
            for _, weight in bucket:
                found.add(weight)
            return load(bucket)

        self.model.load_weights = look_and_load
        try:
            super().receive_weights(update_info)
        finally:
            del self.model.load_weights
        self.digest = found.hexdigest()
