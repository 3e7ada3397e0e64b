"""The part of the configuration that says where metrics go; see `uniapl.config`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from uniapl.config_errors import masked
from uniapl.config_types import Section, Text


class WandbConfig(Section):
    """Weights & Biases; the key comes from WANDB_API_KEY alone."""

    project: Text = Field("uniapl", description="the run's project there")
    entity: Text | None = Field(None, description="user or team; null: the key's own")
    mode: Literal["offline", "online"] = Field("offline", description="offline: RUN/wandb, for `wandb sync`")


class MlflowConfig(Section):
    """MLflow; user, password and token come from MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN alone."""

    experiment: Text = Field("uniapl", description="the run's experiment there")
    tracking_uri: Text | None = Field(None, description="of a server; null: files in RUN/mlflow")


class TrackioConfig(Section):
    """Trackio; a Space's token comes from HF_TOKEN alone."""

    project: Text = Field("uniapl", description="the run's project there")
    space: Text | None = Field(None, description="a Hugging Face Space, USER/NAME; null: files in RUN/trackio")


class LoggingConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = Field(True, description="event files in the run's folder")
    wandb: WandbConfig | None = Field(None, description="Weights & Biases; null: none")
    mlflow: MlflowConfig | None = Field(None, description="MLflow; null: none")
    trackio: TrackioConfig | None = Field(None, description="trackio; null: none")


def logging_conflicts(logging: LoggingConfig) -> list[str]:
    """Secrets in an address: what the configuration holds stands in the run's folder, for all to read."""
    uri = (logging.mlflow and logging.mlflow.tracking_uri) or ""
    if masked(uri) == uri:
        return []
    return [
        f"logging.mlflow.tracking_uri: got '{masked(uri)}'; allowed: no user and password, they are read from the "
        "environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    ]
