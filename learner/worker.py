"""One ZeRO-3 rank as a Ray actor; torch and DeepSpeed are loaded in its own process, not where it is called from."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from uniapl.broadcast_result import Sent
from uniapl.config import Config
from uniapl.imports import importing
from uniapl.loglines import log_lines
from uniapl.objective.sequences import TrainingSequence
from uniapl.records import Demonstration, Group
from uniapl.scratch import make_scratch
from uniapl.shared_paths import node_part, require_visible, require_writable

if TYPE_CHECKING:
    from learner.rank import Rank

Scores = dict[int, list[tuple[float | None, float | None]]]
"""What `uniapl.records.expert_scores` gives."""


class LearnerRank:
    """`address`, then `start` on every rank, then any of the rest: see `learner.rank.Rank`.

    They are collectives, but for `write_universal` and `remove_universal`.
    """

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

    def node(self) -> str:
        """The id of this rank's node."""
        return ray.get_runtime_context().get_node_id()

    def check_paths(self) -> None:
        """Whether this rank's node sees what it will read and write; raises RunError or ConfigError."""
        c, who = self._config, f"learner rank {self._number}"
        paths: dict[str, str | Path] = {"model.path": c.model.path}
        if c.run_url is None:
            paths["run.folder"] = c.run_dir / "config.yaml"
        require_visible(paths, who)
        if c.run_url is not None:
            make_scratch(c.run.scratch)
            shutil.rmtree(c.run_dir / "nodes", ignore_errors=True)  # left of another life
            require_writable(c.run_url, who)

    def start(self, host: str, port: int) -> None:
        """Join the other ranks and load the policy."""
        os.environ.update(
            RANK=str(self._number),
            LOCAL_RANK="0" if ray.get_gpu_ids() else str(self._number),
            WORLD_SIZE=str(self._config.learner.ranks),
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
        )
        with importing(), _without_mlflow():
            from transformers import AutoModelForCausalLM  # noqa: F401

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
        self._rank.save(self._own(folder))

    def write_universal(self, folder: str, place: str) -> None:
        """Of this node's files of a checkpoint what any number of ranks can load. Not a collective."""
        from learner.universal import write_universal

        made = Path(self._own(place))
        shutil.rmtree(made, ignore_errors=True)
        write_universal(Path(self._own(folder)), made)

    def remove_universal(self, place: str) -> None:
        """Not a collective."""
        shutil.rmtree(self._own(place))

    def load(self, folder: str, saved_by: int | None) -> None:
        self._rank.load(self._own(folder), saved_by)

    def export(self, folder: str, card: str) -> None:
        self._rank.export(self._own(folder), card)

    def _own(self, folder: str) -> str:
        """The folder itself or, where the run's folder is in an object store, this node's part of it."""
        if self._config.run_url is None:
            return folder
        part = node_part(self._config, self.node(), Path(folder).name.removesuffix(".partial")).absolute()
        part.mkdir(parents=True, exist_ok=True)
        return str(part)


@contextmanager
def _without_mlflow() -> Iterator[None]:
    """DeepSpeed's autotuner, which nothing here uses, loads MLflow where it is installed: more than all the rest."""
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]
