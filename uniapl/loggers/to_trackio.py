"""Metrics to trackio: files in RUN/trackio, for `trackio show`, or a Hugging Face Space."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

from uniapl.loggers import Place, Record
from uniapl.logging_config import TrackioConfig

FOLDER = "TRACKIO_DIR"
"""Where its files are; read when the package is imported."""


def start(config: TrackioConfig, place: Place) -> TrackioLogger:
    """Begin the run there, or go on with it."""
    os.environ.setdefault(FOLDER, str(place.folder / "trackio"))
    return TrackioLogger(config, place)


class TrackioLogger:
    """One run of a project."""

    def __init__(self, config: TrackioConfig, place: Place) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):  # it tells how to look at the project
            self._run: Any = trackio.init(
                project=config.project,
                name=place.name,
                space_id=config.space,
                config=place.config,
                resume="allow" if place.resume else "never",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, records: list[Record]) -> None:
        for record in records:
            values = {key: value for key, value in record.items() if key not in ("step", "time")}
            self._run.log(values, step=int(record["step"]))

    def close(self, failed: bool) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()
