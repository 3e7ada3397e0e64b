"""Paths of a run that more than one machine reads or writes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.runlog import RunError


def require_absolute(config: Config) -> None:
    """For a job on a cluster, whose working folder is a copy of the code on each node, and goes with the job.

    Raises:
        ConfigError: one line for each path that is relative.
    """
    lines = [
        f"{key}: got '{path}'; allowed in a job: an absolute path, on storage that all nodes share"
        for key, path in _paths(config)
        if not os.path.isabs(path)
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


def _paths(config: Config) -> Iterator[tuple[str, str]]:
    yield "run.folder", config.run.folder
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
