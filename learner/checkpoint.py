"""The learner's part of a checkpoint, and the export of its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

TAG = "zero"


def save_engine(engine: Any, folder: Path) -> None:
    """ZeRO-3 shards of weights and optimizer, one file per rank, in `folder`/zero."""
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)


def load_engine(engine: Any, folder: Path) -> None:
    """The inverse of `save_engine`, with the same number of ranks.

    Raises:
        RuntimeError: DeepSpeed found nothing to load there.
    """
    path, _ = engine.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
    if path is None:
        raise RuntimeError(f"{folder}: holds no ZeRO-3 state")


def export_model(engine: Any, source: str, folder: Path, rank: int) -> None:
    """Gather the weights parameter by parameter and write a Hugging Face folder from rank 0.

    Args:
        engine: the ZeRO-3 engine around a `Policy`.
        source: the folder that training began from; its tokenizer and chat template go along.
        folder: replaced if it is there.
        rank: of this process.
    """
    model: nn.Module = engine.module.model
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if rank == 0:
                state[name] = parameter.detach().cpu().clone()
    if rank == 0:
        _write(model, state, source, folder)


def _write(model: Any, state: dict[str, torch.Tensor], source: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=state)
    AutoTokenizer.from_pretrained(source).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
