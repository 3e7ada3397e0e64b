"""Everything that can be wrong with a run's input, found before any process starts."""

from __future__ import annotations

from pathlib import Path

from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.data.sources import heldout_prompts, open_sources
from uniapl.discriminators import check_discriminator
from uniapl.records import Prompt
from uniapl.rewards import resolve


def preflight(config: Config) -> list[Prompt]:
    """Check model, data, rewards and discriminator; returns the held-out prompts to evaluate on.

    Raises:
        ConfigError: a part that the configuration names is missing.
        DataError: a shard is not what it should be.
    """
    if not (Path(config.model.path) / "config.json").is_file():
        raise ConfigError(f"model.path: got '{config.model.path}'; allowed: a Hugging Face folder with a config.json")
    open_sources(config)
    if not config.needs_engine:
        return []
    resolve(config.reward.functions)
    check_discriminator(config)
    return heldout_prompts(config, config.evaluation.prompts) if config.evaluation.prompts else []
