"""One ZeRO-3 rank as a Ray actor; torch and DeepSpeed are loaded in its own process, not where it is called from."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from uniapl.broadcast_result import Sent
from uniapl.config import Config
from uniapl.loglines import log_lines
from uniapl.objective.sequences import TrainingSequence
from uniapl.records import Demonstration, Group
from uniapl.shared_paths import require_visible

if TYPE_CHECKING:
    from learner.rank import Rank

Scores = dict[int, list[tuple[float | None, float | None]]]
"""What `uniapl.records.expert_scores` gives."""


class LearnerRank:
    """`address`, then `start` on every rank, then any of the rest, which are collectives: see `learner.rank.Rank`."""

    def __init__(self, rank: int, config: Config) -> None:
        self._number = rank
        self._config = config
        self._lines = log_lines(config.run.name, f"learner-{rank}")
        self._rank: Rank

    def address(self) -> tuple[str, int]:
        """This machine's address and a port that is free on it: where rank 0 is to be met."""
        host = ray.util.get_node_ip_address()
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            return host, probe.getsockname()[1]

    def check_paths(self) -> None:
        """Whether this rank's node sees what it will read and write; raises RunError."""
        paths: dict[str, str | Path] = {
            "run.folder": self._config.run_dir / "config.yaml",
            "model.path": self._config.model.path,
        }
        require_visible(paths, f"learner rank {self._number}")

    def start(self, host: str, port: int) -> None:
        """Join the other ranks and load the policy."""
        os.environ.update(
            RANK=str(self._number),
            LOCAL_RANK="0" if ray.get_gpu_ids() else str(self._number),
            WORLD_SIZE=str(self._config.learner.ranks),
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
        )
        from learner.rank import Rank

        self._rank = Rank(self._number, self._config)

    def step(
        self, number: int, groups: list[Group], demonstrations: list[Demonstration], weights: dict[str, float]
    ) -> tuple[dict[str, float], Scores]:
        self._lines.step = number + 1
        return self._rank.step(number, groups, demonstrations, weights)

    def logprobs(self, sequences: list[TrainingSequence]) -> list[list[float]]:
        return self._rank.logprobs(sequences)

    def connect(self, handles: list[Any]) -> Sent:
        return self._rank.connect(handles)

    def broadcast(self, version: int, vector_scale: float) -> Sent:
        return self._rank.broadcast(version, vector_scale)

    def save(self, folder: str) -> None:
        self._rank.save(folder)

    def load(self, folder: str) -> None:
        self._rank.load(folder)

    def export(self, folder: str, step: int) -> None:
        self._rank.export(folder, step)
