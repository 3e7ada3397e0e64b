"""Everything that can be wrong with a run's input, found before any process starts."""

from __future__ import annotations

from cluster.job import in_job
from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.data.encoding import check_template
from uniapl.data.model_folder import check_model, read_model_config, size_of
from uniapl.data.sources import DemonstrationSource, PromptSource, heldout_prompts, open_sources
from uniapl.discriminators import check_discriminator
from uniapl.records import Prompt
from uniapl.rewards import require_rewards
from uniapl.rewards.cache import require_redis
from uniapl.shared_paths import require_absolute

FIRST_ROWS = 1000
"""Prompts, and demonstrations, that are read before the start, at most."""


def preflight(config: Config) -> list[Prompt]:
    """Check model, data, rewards, Redis and discriminator; returns the held-out prompts to evaluate on.

    Raises:
        ConfigError: a part that the configuration names is missing.
        DataError: a shard is not what it should be.
    """
    if in_job():
        require_absolute(config)
    read_model_config("model.path", config.model.path)
    check_template(config.model.path)
    prompts, demonstrations = open_sources(config)
    check_model(config, len(prompts.encoder.tokenizer))
    _check_reference(config)
    _check_first_rows(config, prompts, demonstrations)
    if not config.needs_engine:
        return []
    require_rewards(config.reward.functions, config.reward.timeout_s)
    if config.reward.redis_url is not None:
        require_redis(config.reward.redis_url)
    check_discriminator(config)
    return heldout_prompts(config, config.evaluation.prompts) if config.evaluation.prompts else []


def _check_first_rows(config: Config, prompts: PromptSource, demonstrations: DemonstrationSource) -> None:
    """Read what the first steps will consume, as they will: a bad row is found now, not an hour later."""
    steps, o = range(config.run.steps), config.objective
    wanted = config.queue.groups_per_step * sum(map(o.rollouts_at, steps))
    for _ in range(min(wanted, FIRST_ROWS, prompts.state_dict()["rows"])):
        prompts.next()
    wanted = config.queue.demonstrations_per_step * sum(map(o.demonstrations_at, steps))
    for _ in range(min(wanted, FIRST_ROWS, demonstrations.state_dict()["rows"])):
        demonstrations.next()


def _check_reference(config: Config) -> None:
    kl = config.objective.kl
    if kl.reference is None or not kl.weight.ever_positive:
        return
    folders = {"objective.kl.reference": kl.reference, "model.path": config.model.path}
    sizes = [size_of(read_model_config(key, folder), "vocab_size") for key, folder in folders.items()]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"objective.kl.reference: got '{kl.reference}', which has a vocabulary of {sizes[0]}; "
            f"allowed: the policy's, {sizes[1]}"
        )
