"""Groups that stand ready for a batch: in the order of their prompts, and which of them are too old."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from uniapl.leases import Task, task_from_dict
from uniapl.records import Demonstration


@dataclass(frozen=True)
class ReadyGroup:
    """A committed group; `handle` is the caller's, never looked into."""

    task: Task
    lease_id: int
    handle: Any
    oldest_version: int
    tokens: int
    actor: str


@dataclass(frozen=True)
class BatchPlan:
    """What optimizer step `step` consumes: groups in the order of their sequence, demonstrations."""

    step: int
    groups: list[ReadyGroup]
    demonstrations: list[Demonstration]


class ReadyGroups:
    """Ready groups by sequence. Adding one, and finding that none is too old, cost the same for any number."""

    def __init__(self, groups: list[ReadyGroup] = []) -> None:  # noqa: B006 (only read)
        self._groups = {group.task.sequence: group for group in groups}
        self._versions = Counter(group.oldest_version for group in groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[ReadyGroup]:
        return iter(self._groups.values())

    def add(self, group: ReadyGroup) -> None:
        self._groups[group.task.sequence] = group
        self._versions[group.oldest_version] += 1

    def take(self, count: int) -> list[ReadyGroup]:
        """Remove and return the `count` groups of the smallest sequences."""
        return [self._remove(sequence) for sequence in sorted(self._groups)[:count]]

    def any_older(self, version: int) -> bool:
        return min(self._versions, default=version) < version

    def take_older(self, version: int) -> list[ReadyGroup]:
        """Remove and return the groups with a token from weights older than `version`."""
        if not self.any_older(version):
            return []
        old = [sequence for sequence, group in self._groups.items() if group.oldest_version < version]
        return [self._remove(sequence) for sequence in old]

    def _remove(self, sequence: int) -> ReadyGroup:
        group = self._groups.pop(sequence)
        self._versions[group.oldest_version] -= 1
        if not self._versions[group.oldest_version]:
            del self._versions[group.oldest_version]
        return group


def pack_ready(group: ReadyGroup, pack: Callable[[Any], Any]) -> dict[str, Any]:
    """A ready group as a dictionary, JSON-able where what `pack` makes is."""
    fields = {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}
    return {**fields, "task": dataclasses.asdict(group.task), "handle": pack(group.handle)}


def unpack_ready(packed: dict[str, Any], unpack: Callable[[Any], Any]) -> ReadyGroup:
    """The inverse of `pack_ready`."""
    return ReadyGroup(**{**packed, "task": task_from_dict(packed["task"]), "handle": unpack(packed["handle"])})
