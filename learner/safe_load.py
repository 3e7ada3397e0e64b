"""Loading of DeepSpeed's checkpoint files as data: nothing that was put into them is called."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from learner.zero_files import ALLOWED
from uniapl.runlog import RunError

DEEPSPEEDS_OWN = [LossScaler, ZeroStageEnum]
"""What stands in the files beside tensors, numbers, texts and containers; both hold numbers alone."""
torch.serialization.add_safe_globals(DEEPSPEEDS_OWN)
FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""PyTorch's own: `weights_only=True` for every load of a process, whatever the caller says."""


def safe_load(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """What DeepSpeed saved in `path`.

    Raises:
        RunError: the file names anything else that would have to be called, or is no such file.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{path}: holds something that DeepSpeed does not write: {reason}; {ALLOWED}") from None


@contextmanager
def data_only() -> Iterator[None]:
    """What DeepSpeed itself loads inside of the block is read as data too, also where it asks PyTorch for more."""
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        yield
    finally:
        del os.environ[FORCED]
        if before is not None:
            os.environ[FORCED] = before


class SafeCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's own, but for the loading."""

    def load(self, path: str, map_location: Any = None) -> Any:
        return safe_load(path, map_location)
