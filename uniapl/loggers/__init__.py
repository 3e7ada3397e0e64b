"""Where metrics go besides metrics.jsonl: a module for each service, all with the methods of `Logger`.

A client that is missing, or cannot start, is one line before anything else starts. One that fails later is told of
once, keeps what it could not send, and tries again every minute: metrics.jsonl has everything.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from uniapl.config import Config
from uniapl.config_errors import ConfigError, masked

SERVICES = {"wandb": "wandb", "mlflow": "mlflow-skinny", "trackio": "trackio"}
"""Keys of the section `logging`, and the package behind each; `uniapl[KEY]` installs it."""
RETRY_S = 60.0
Record = Mapping[str, float]
"""The metrics of a step, with `step` and `time` (unix seconds) among them."""


class Logger(Protocol):
    """One service. Any of the methods may raise whatever its client raises."""

    def log(self, records: list[Record]) -> None:
        """Send steps, in their order."""

    def close(self, failed: bool) -> None:
        """Send what is left, and tell how the run ended."""


@dataclass(frozen=True)
class Place:
    """What a service is to know of a run."""

    name: str
    folder: Path
    """Of the run; offline, a service's files are in a folder of its name there."""
    resume: bool
    """The run goes on; so does its record at the service."""
    config: dict[str, Any]


class Guarded:
    """A logger whose failures do not end the run."""

    def __init__(self, key: str, logger: Logger, retry_s: float = RETRY_S) -> None:
        self._key = key
        self._logger = logger
        self._retry_s = retry_s
        self._retry_at = 0.0
        self._told = False
        self._waiting: list[Record] = []

    def log(self, record: Record) -> None:
        """Send a step, and those that could not be sent before; told of once if it fails."""
        self._waiting.append(record)
        if time.monotonic() < self._retry_at:
            return
        try:
            self._logger.log(self._waiting)
            self._waiting = []
        except Exception as error:  # whatever a client raises
            self._retry_at = time.monotonic() + self._retry_s
            self._failed(error)

    def close(self, failed: bool) -> None:
        """What is left is tried once more."""
        try:
            if self._waiting:
                self._logger.log(self._waiting)
            self._logger.close(failed)
        except Exception as error:  # as above
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        if not self._told:
            said = "tried again every minute; metrics.jsonl has all steps"
            warnings.warn(f"logging.{self._key}: {_reason(error)}; {said}", stacklevel=3)
        self._told = True


def open_loggers(config: Config, folder: Path, resume: bool) -> list[Guarded]:
    """The services that the configuration names, started.

    Args:
        config: of the run.
        folder: of the run, which is there.
        resume: whether the run goes on.

    Raises:
        ConfigError: a client is not installed, or did not start; those before it are closed.
    """
    place = Place(config.run.name, folder.absolute(), resume, config.model_dump(mode="json"))
    opened: list[Guarded] = []
    for key in SERVICES:
        section = getattr(config.logging, key)
        if section is None:
            continue
        try:
            module = importlib.import_module(f"uniapl.loggers.to_{key}")
            opened.append(Guarded(key, module.start(section, place)))
        except Exception as error:  # whatever a client raises
            for before in opened:
                before.close(failed=True)
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"logging.{key}: did not start: {_reason(error)}; {_next(key, error)}") from None
    return opened


def _next(key: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"allowed: null, or after `pip install 'uniapl[{key}]'`"
    return "allowed: null, offline, or a server that answers and lets this user in"


def _reason(error: Exception) -> str:
    return masked(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
