"""Metrics to Weights & Biases. Offline they are in RUN/wandb, for `wandb sync`."""

from __future__ import annotations

import os
import secrets
from typing import Any

from uniapl.config_errors import ConfigError
from uniapl.loggers import Place, Record
from uniapl.logging_config import WandbConfig

API_KEY = "WANDB_API_KEY"
ID_FILE = "id"
START_S = 60


def start(config: WandbConfig, place: Place) -> WandbLogger:
    """Begin the run there, or go on with it.

    Raises:
        ConfigError: online without a key in the environment.
    """
    if config.mode == "online" and not os.environ.get(API_KEY):
        raise ConfigError(f"logging.wandb.mode: got 'online'; allowed: with a key in the environment: {API_KEY}")
    return WandbLogger(config, place)


class WandbLogger:
    """One run at W&B; `step` is the x-axis, so that a resumed run may log steps again that it makes again."""

    def __init__(self, config: WandbConfig, place: Place) -> None:
        import wandb

        folder = place.folder / "wandb"
        folder.mkdir(exist_ok=True)
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            x_disable_stats=True,
            init_timeout=START_S,
        )
        self._run: Any = wandb.init(
            project=config.project,
            entity=config.entity,
            name=place.name,
            id=_id(folder / ID_FILE),
            dir=str(place.folder),
            mode=config.mode,
            resume="allow",
            config=place.config,
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, records: list[Record]) -> None:
        for record in records:
            self._run.log(dict(record))

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _id(path: Any) -> str:
    """The run's id there, drawn once."""
    if not path.is_file():
        path.write_text(secrets.token_hex(8))
    return str(path.read_text().strip())
