"""Metrics to MLflow: a tracking server, or without one files in RUN/mlflow."""

from __future__ import annotations

import os
from typing import Any

from uniapl.loggers import Place, Record
from uniapl.logging_config import MlflowConfig

LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""The client's own, 7 times 2 minutes, would hold the run up; whoever sets them otherwise is obeyed."""
FILES_ALLOWED = "MLFLOW_ALLOW_FILE_STORE"
"""MLflow 3 takes no files without it; `mlflow migrate-filestore` moves them into a database."""
TAG = "uniapl.folder"
MOST = 1000
"""Metrics that one request may hold."""


def start(config: MlflowConfig, place: Place) -> MlflowLogger:
    """Begin the run there, or go on with it."""
    for name, value in LIMITS.items():
        os.environ.setdefault(name, value)
    return MlflowLogger(config, place)


class MlflowLogger:
    """One run of an experiment."""

    def __init__(self, config: MlflowConfig, place: Place) -> None:
        os.environ.setdefault(FILES_ALLOWED, "true")
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(config.tracking_uri or (place.folder / "mlflow").as_uri())
        found = self._client.get_experiment_by_name(config.experiment)
        self._experiment = found.experiment_id if found else self._client.create_experiment(config.experiment)
        self._run = (place.resume and self._earlier(place)) or self._new(place)
        self._client.update_run(self._run, status="RUNNING")

    def _earlier(self, place: Place) -> str | None:
        """The run that was begun for the same folder."""
        wanted = f"tags.`{TAG}` = '{str(place.folder).replace(chr(39), '')}'"
        runs = self._client.search_runs([self._experiment], filter_string=wanted, max_results=1)
        return runs[0].info.run_id if runs else None

    def _new(self, place: Place) -> str:
        from mlflow.entities import Param

        folder = str(place.folder).replace("'", "")
        run: str = self._client.create_run(self._experiment, run_name=place.name, tags={TAG: folder}).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in _leaves(place.config)]
        for i in range(0, len(params), 100):
            self._client.log_batch(run, params=params[i : i + 100])
        return run

    def log(self, records: list[Record]) -> None:
        from mlflow.entities import Metric

        found = [
            Metric(key, value, int(record["time"] * 1000), int(record["step"]))
            for record in records
            for key, value in record.items()
            if key not in ("step", "time")
        ]
        for i in range(0, len(found), MOST):
            self._client.log_batch(self._run, metrics=found[i : i + MOST])

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, status="FAILED" if failed else "FINISHED")


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found
