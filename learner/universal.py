"""ZeRO-3 state for another number of ranks than saved it: DeepSpeed's universal checkpoint.

Its converter writes each parameter's master and moments whole, a file for each; its loader cuts them for the ranks that
there are. Of what it takes from the first parameter group for all of them, each group gets its own back.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal

from learner.safe_load import data_only, safe_load
from learner.zero_files import ALLOWED, is_of_a_rank
from uniapl.runlog import RunError

TIMES = 2
"""The converter writes the optimizer's state in fragments, then joins them, and removes the fragments last."""


def is_universal(folder: Path) -> bool:
    return (folder / "zero").is_dir()


def write_universal(checkpoint: Path, place: Path) -> None:
    """Convert all ZeRO-3 state in `checkpoint` into the new folder `place`; in one process, not a collective.

    Raises:
        RunError: the disk has no room for it, or a file holds something that DeepSpeed does not write.
    """
    files = [path for path in sorted(checkpoint.glob("*/*")) if is_of_a_rank(path.name)]
    for path in files:
        safe_load(path, mmap=True)
    place.mkdir()
    try:
        _require_space(place, sum(path.stat().st_size for path in files))
        for folder in sorted({path.parent for path in files}):
            _convert(folder, place / folder.name)
    except BaseException:
        shutil.rmtree(place)  # a full disk has room again
        raise


def load_universal(engine: Any, folder: Path, tag: str) -> None:
    """Load what `write_universal` made. A collective of any number of ranks.

    Masters and moments are bit for bit those that were saved; the weights follow from the masters.

    Args:
        engine: the ZeRO-3 engine, with `learner.safe_load.SafeCheckpointEngine`.
        folder: that was written.
        tag: of this engine.

    Raises:
        RunError: the saved parameters are not this model's.
    """
    saved = {path.parent.name for path in (folder / tag / "zero").glob("*/fp32.pt")}
    if set(engine.param_names.values()) != saved:
        raise RunError(f"{folder / tag}: holds other parameters than the model has; {ALLOWED}")
    settings = [{k: v for k, v in group.items() if k != "params"} for group in _groups(engine)]
    with _as_universal(engine), data_only():
        engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
    for group, own in zip(_groups(engine), settings, strict=True):
        group.update(own)
    state = engine.optimizer.optimizer.state
    for flat in engine.optimizer.fp32_partitioned_groups_flat:  # one counter was put into all of them: AdamW would
        state[flat]["step"] = torch.as_tensor(state[flat]["step"]).to(flat.device, copy=True)  # add to it for each


def _groups(engine: Any) -> list[dict[str, Any]]:
    return engine.optimizer.optimizer.param_groups


@contextlib.contextmanager
def _as_universal(engine: Any) -> Iterator[None]:
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def _convert(folder: Path, place: Path) -> None:
    """Without the converter's own worker processes: they are forked, and this process has threads and maybe a GPU."""
    arguments = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(place),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), data_only():
        ds_to_universal.main(arguments)


def _require_space(place: Path, size: int) -> None:
    needed, free = TIMES * size, shutil.disk_usage(place).free
    if needed > free:
        raise RunError(
            f"{place}: what another number of learner ranks loads needs {needed >> 20} MiB there, {free >> 20} MiB are "
            "free; allowed: learner.ranks as it was saved, or more room"
        )
