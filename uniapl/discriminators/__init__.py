"""Discriminators: how close a response is to the expert's.

`embedding`, `reference_reward` and the user's own (`module:Class`) are frozen and served by the reward service;
`cotrained` learns in the learner's ranks, see `uniapl.discriminators.cotrained`.
"""

from __future__ import annotations

from uniapl.config import Config
from uniapl.discriminators.types import Comparison, Discriminator, ExpertScores

__all__ = ["Comparison", "Discriminator", "ExpertScores", "check_discriminator", "open_discriminator"]


def check_discriminator(config: Config) -> None:
    """Find out whether what the configured discriminator needs is there, without loading weights.

    Raises:
        ConfigError: a folder is missing, or holds something else; the user's class cannot be imported.
        DataError: a file of comparisons cannot be used.
    """
    adversarial = config.objective.adversarial
    if adversarial.discriminator == "embedding":
        from uniapl.discriminators.encoder_folder import resolve_encoder

        resolve_encoder(adversarial.encoder)
    elif adversarial.discriminator == "reference_reward":
        from uniapl.discriminators.reference_reward import resolve_reward_model

        resolve_reward_model(adversarial.reward_model)
    elif ":" in adversarial.discriminator:
        from uniapl.discriminators.own import resolve_own

        resolve_own(adversarial.discriminator)
    elif config.objective.cotrained:
        from uniapl.discriminators.cotrained import resolve_backbone

        resolve_backbone(config)
        if adversarial.cotrained.comparisons:
            from uniapl.discriminators.warm_up import check_warm_up

            check_warm_up(config)


def open_discriminator(config: Config, threads: int | None = None) -> Discriminator | None:
    """The frozen discriminator of the configuration, loaded; None where there is none to serve.

    Args:
        config: of the run.
        threads: CPU threads of a forward pass; None: torch's own choice.

    Raises:
        ConfigError: its folder is missing, or holds something else.
    """
    adversarial = config.objective.adversarial
    if adversarial.discriminator == "embedding":
        from uniapl.discriminators.embedding import EmbeddingDiscriminator
        from uniapl.discriminators.encoder_folder import resolve_encoder

        return EmbeddingDiscriminator(resolve_encoder(adversarial.encoder), threads)
    if adversarial.discriminator == "reference_reward":
        from uniapl.discriminators.reference_reward import ReferenceRewardDiscriminator, resolve_reward_model

        return ReferenceRewardDiscriminator(resolve_reward_model(adversarial.reward_model), threads)
    if ":" in adversarial.discriminator:
        from uniapl.discriminators.own import OwnDiscriminator

        return OwnDiscriminator(adversarial.discriminator)
    return None
