"""ZeRO-3 state saved by another number of ranks, cut anew for the ranks that there are.

DeepSpeed's own way (universal checkpoints) writes the state out once more, one file per parameter, and its
loader gives all parameter groups the weight decay of the first and one counter of steps to all. Here each rank
reads the saved shards where they lie (memory-mapped), puts together one parameter at a time and keeps its piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learner.safe_load import safe_load
from learner.zero_files import ALLOWED, MODEL_FILE, OPTIMIZER_FILE
from uniapl.runlog import RunError

MOMENTS = ("exp_avg", "exp_avg_sq")


def _optimizer_files(folder: Path) -> list[Path]:
    """In the order of the ranks; in bfloat16 their names begin otherwise."""
    found = {int(m[2]): p for p in folder.glob("*_optim_states.pt") if (m := OPTIMIZER_FILE.fullmatch(p.name))}
    return [path for _, path in sorted(found.items())]


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies in every saved shard."""

    group: int
    offset: int
    shape: tuple[int, ...]
    """Of the whole parameter."""
    numel: int
    """Of the whole parameter; a shard holds ceil(numel / ranks) of it, the last one's end is padding."""


class SavedState:
    """The shards of all saved ranks, memory-mapped."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.ranks = ranks
        self.shards = [safe_load(path, mmap=True)["optimizer_state_dict"] for path in _optimizer_files(folder)]
        self.places = dict(_places(safe_load(folder / MODEL_FILE, mmap=True)["param_shapes"], ranks))

    def whole(self, name: str, key: str) -> Tensor:
        """A parameter's float32 master or one of its moments, flat, without padding."""
        place = self.places[name]
        size = math.ceil(place.numel / self.ranks)
        pieces = [self._flat(shard, place.group, key)[place.offset : place.offset + size] for shard in self.shards]
        return torch.cat(pieces)[: place.numel]

    def steps(self, name: str) -> Any:
        """The counter of Adam's steps that a parameter was saved with."""
        step = self.shards[0]["optimizer_state_dict"]["state"][self.places[name].group]["step"]
        return step.clone() if torch.is_tensor(step) else step

    @staticmethod
    def _flat(shard: dict[str, Any], group: int, key: str) -> Tensor:
        if key == "fp32":
            return shard["fp32_flat_groups"][group]
        return shard["optimizer_state_dict"]["state"][group][key]


def load_resharded(engine: Any, folder: Path, ranks: int) -> None:
    """Load what `ranks` ranks saved in `folder` into an engine of another number of ranks. A collective.

    Masters and moments are bit for bit those that were saved; the weights follow from the masters.

    Args:
        engine: the ZeRO-3 engine, as `learner.zero.build_engine` makes it.
        folder: of the checkpoint's ZeRO-3 state.
        ranks: of the run that wrote it, from `learner.zero_files.saved_ranks`.

    Raises:
        RunError: the saved parameters are not this model's.
    """
    optimizer, saved = engine.optimizer, SavedState(folder, ranks)
    optimizer.checkpoint_event_prologue()
    names = [[engine.param_names[p] for p in group] for group in optimizer.fp16_groups]
    if {name for group in names for name in group} != saved.places.keys():
        raise RunError(f"{folder}: holds other parameters than the model has; {ALLOWED}")
    flats = [
        _shard(group, saved, flat) for group, flat in zip(names, optimizer.fp32_partitioned_groups_flat, strict=True)
    ]
    state = dict(saved.shards[0])
    state["fp32_flat_groups"] = [flat.pop("fp32") for flat in flats]
    moments = {
        i: flat | {"step": saved.steps(group[0])} for i, (group, flat) in enumerate(zip(names, flats, strict=True))
    }
    state["optimizer_state_dict"] = {"state": moments, "param_groups": _param_groups(optimizer, saved)}
    optimizer._rigid_load_state_dict(state)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer.checkpoint_event_epilogue()


def _shard(names: list[str], saved: SavedState, like: Tensor) -> dict[str, Tensor]:
    """This rank's flat master and moments of one of the engine's groups."""
    world, rank = dist.get_world_size(), dist.get_rank()
    found = {}
    for key in ("fp32", *MOMENTS):
        flat = torch.zeros_like(like, device="cpu", dtype=torch.float32)
        offset = 0
        for name in names:
            whole = saved.whole(name, key)
            size = math.ceil(whole.numel() / world)
            mine = whole[rank * size : (rank + 1) * size]
            flat[offset : offset + mine.numel()] = mine
            offset += size
        found[key] = flat
    return found


def _param_groups(optimizer: Any, saved: SavedState) -> list[dict[str, Any]]:
    """The saved settings of each parameter group, over the flat groups that this engine has."""
    optimizer._set_fp32_optimizer_param_groups()
    present = optimizer.optimizer.state_dict()["param_groups"]
    optimizer._clear_fp32_optimizer_param_groups()
    before = saved.shards[0]["optimizer_state_dict"]["param_groups"]
    return [old | {"params": new["params"]} for old, new in zip(before, present, strict=True)]


def _places(groups: list[dict[str, Any]], ranks: int) -> Iterator[tuple[str, _Place]]:
    for group, shapes in enumerate(groups):
        offset = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            yield name, _Place(group, offset, tuple(shape), numel)
            offset += math.ceil(numel / ranks)
