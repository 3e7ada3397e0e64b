"""Paths of a run that more than one machine reads or writes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.runlog import RunError
from uniapl.storage import StorageError, check_writable, is_remote

SHARED = "an absolute path, on storage that all nodes share"
REMOTE = ("run.folder", "data.train", "data.heldout")
"""Keys that may also be URLs."""


def require_absolute(config: Config) -> None:
    """For a job on a cluster, whose working folder is a copy of the code on each node, and goes with the job.

    Raises:
        ConfigError: one line for each path that is relative.
    """
    lines = [
        f"{key}: got '{path}'; allowed in a job: {SHARED}{', or a URL of an object store' if key in REMOTE else ''}"
        for key, path in _paths(config)
        if not (os.path.isabs(path) or (key in REMOTE and is_remote(path)))
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def require_visible(paths: Mapping[str, str | Path], who: str) -> None:
    """Check on a part's own machine that it sees what it will use.

    Args:
        paths: by the configuration's key.
        who: the part, for the message.

    Raises:
        RunError: it does not.
    """
    for key, path in paths.items():
        if not os.path.exists(path):
            raise RunError(
                f"{key}: {os.path.abspath(path)} is not there on the node of {who} ({os.uname().nodename}); "
                "allowed: a path on storage that all nodes share"
            )


def require_writable(url: str, who: str) -> None:
    """Check on a part's own machine that it can write into the run's folder in an object store.

    Raises:
        ConfigError: it cannot, with what the store said.
    """
    try:
        check_writable(url)
    except StorageError as error:
        raise ConfigError(
            f"run.folder: {error}; allowed: a folder that {who} on {os.uname().nodename} can write"
        ) from None


def node_part(config: Config, node: str, name: str) -> Path:
    """With an object store: where a node's learner ranks write their part of a checkpoint, or the model, called `name`.

    Nodes that share a disk do not share it, so that each is sent by its own node alone.
    """
    return config.run_dir / "nodes" / node / name


def _paths(config: Config) -> Iterator[tuple[str, str]]:
    yield "run.folder", config.run.folder
    if config.run.scratch is not None:
        yield "run.scratch", config.run.scratch
    yield "model.path", config.model.path
    yield from (("data.train", path) for path in config.data.train)
    yield from (("data.heldout", path) for path in config.data.heldout)
    objective = config.objective
    comparisons = objective.adversarial.cotrained.comparisons
    yield from (("objective.adversarial.cotrained.comparisons", path) for path in comparisons)
    further = {
        "objective.kl.reference": objective.kl.reference,
        "objective.adversarial.cotrained.model": objective.adversarial.cotrained.model,
        "objective.adversarial.reward_model": objective.adversarial.reward_model,
    }
    yield from ((key, path) for key, path in further.items() if path is not None)
