"""The learner's part of a checkpoint, and the export of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from learner.export import write_folder
from learner.safe_load import SafeCheckpointEngine
from learner.universal import is_universal, load_universal
from learner.zero_files import ALLOWED, TAG, ranks_in
from uniapl.runlog import RunError


def save_engine(engine: Any, folder: Path, tag: str = TAG) -> None:
    """ZeRO-3 shards of weights and optimizer, one file per rank, in `folder`/`tag`."""
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)


def load_engine(engine: Any, folder: Path, tag: str = TAG, saved_by: int | None = None) -> None:
    """The inverse of `save_engine`.

    Args:
        engine: of as many ranks as saved it.
        folder: of the checkpoint, or what `learner.universal.write_universal` made of it for any number of ranks.
        tag: of this engine.
        saved_by: the number of ranks that saved it, where `folder` holds only what this rank needs
            (`learner.zero_files.needed`); None: all of it is there.

    Raises:
        RunError: there is nothing to load, or not all of it, or something that DeepSpeed did not write.
    """
    engine.checkpoint_engine = SafeCheckpointEngine(engine._config)
    if is_universal(folder / tag):
        load_universal(engine, folder, tag)
        return
    ranks = ranks_in(folder / tag) if saved_by is None else saved_by
    if ranks == 0:
        raise RunError(f"{folder / tag}: holds no ZeRO-3 state; {ALLOWED}")
    if ranks != dist.get_world_size():
        raise RunError(f"{folder / tag}: was saved by {ranks} learner ranks; allowed: {dist.get_world_size()}")
    path, _ = engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
    if path is None:
        raise RunError(f"{folder / tag}: DeepSpeed loaded nothing; {ALLOWED}")


def export_model(engine: Any, source: str, folder: Path, rank: int, card: str) -> None:
    """Gather the weights parameter by parameter and write a Hugging Face folder from rank 0.

    Args:
        engine: the ZeRO-3 engine around a `Policy`.
        source: the folder that training began from; its tokenizer and chat template go along.
        folder: replaced if it is there.
        rank: of this process.
        card: the text of its README.md.
    """
    model: nn.Module = engine.module.model
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if rank == 0:
                state[name] = parameter.detach().cpu().clone()
    if rank == 0:
        write_folder(model, state, source, folder, card)
