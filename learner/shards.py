"""The weights in ZeRO-3 state, read from the saved shards without ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.safe_load import safe_load
from learner.zero_files import MODEL_FILE, OPTIMIZER_FILE


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
    """Of the whole parameter; a shard holds ceil(elements / ranks) of it, the last one's end is padding."""


class SavedWeights:
    """The float32 masters in the shards of all saved ranks, memory-mapped: one parameter at a time is read.

    Args:
        folder: of the checkpoint's ZeRO-3 state.
        ranks: that wrote it, from `learner.zero_files.ranks_in`.
    """

    def __init__(self, folder: Path, ranks: int) -> None:
        self.ranks = ranks
        shards = (safe_load(path, mmap=True)["optimizer_state_dict"] for path in _optimizer_files(folder))
        self._flats: list[list[Tensor]] = [shard["fp32_flat_groups"] for shard in shards]
        self.places = dict(_places(safe_load(folder / MODEL_FILE, mmap=True)["param_shapes"], ranks))

    def whole(self, name: str) -> Tensor:
        """A parameter in its shape."""
        place = self.places[name]
        elements = math.prod(place.shape)
        size = math.ceil(elements / self.ranks)
        pieces = [flats[place.group][place.offset : place.offset + size] for flats in self._flats]
        return torch.cat(pieces)[:elements].view(place.shape)


def _places(groups: list[dict[str, Any]], ranks: int) -> Iterator[tuple[str, _Place]]:
    for group, shapes in enumerate(groups):
        offset = 0
        for name, shape in shapes.items():
            yield name, _Place(group, offset, tuple(shape))
            offset += math.ceil(math.prod(shape) / ranks)
