"""Everything that can be wrong with a run's input, found before any process starts."""

from __future__ import annotations

import json
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
    _check_reference(config)
    if not config.needs_engine:
        return []
    resolve(config.reward.functions)
    check_discriminator(config)
    return heldout_prompts(config, config.evaluation.prompts) if config.evaluation.prompts else []


def _check_reference(config: Config) -> None:
    kl = config.objective.kl
    if kl.reference is None or not kl.weight.ever_positive:
        return
    sizes = []
    for folder in (kl.reference, config.model.path):
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ConfigError(
                f"objective.kl.reference: got '{folder}'; allowed: a Hugging Face folder with a config.json"
            )
        sizes.append(json.loads(path.read_text(encoding="utf-8")).get("vocab_size"))
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"objective.kl.reference: got '{kl.reference}', which has a vocabulary of {sizes[0]}; "
            f"allowed: the policy's, {sizes[1]}"
        )
