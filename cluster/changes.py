"""What a resumed run's configuration may change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from uniapl.config_errors import ConfigError

FIXED = {
    "run.seed": "data order and samples follow from it",
    "model.path": "the checkpoint holds this model's weights",
    "data.train": "the cursors stand in these shards",
    "data.on_bad_row": "the cursors count these rows",
    "data.max_prompt_tokens": "the cursors count these rows",
    "data.max_response_tokens": "the cursors count these rows",
    "rollout.group_size": "groups that stand ready are of this size",
    "queue.groups_per_step": "the cursors stand between such batches",
    "queue.demonstrations_per_step": "the cursors stand between such batches",
    "objective.adversarial.discriminator": "the checkpoint holds what was trained",
    "objective.adversarial.cotrained": "the discriminator's optimizer is restored with it",
    "learner.dtype": "the optimizer's state is laid out for it",
    "learner.betas": "the optimizer is restored with it",
    "learner.weight_decay": "the optimizer is restored with it",
}
"""Keys, or sections, that stay as they were, and why. All others may change, as between any two steps."""


def check_changes(before: dict[str, Any], now: dict[str, Any], where: str) -> list[str]:
    """The changes that are allowed, one line each.

    Args:
        before: the configuration that the run had, as a tree.
        now: the one it is to go on with.
        where: the run's folder, for the error.

    Raises:
        ConfigError: one line per key that must not change.
    """
    old, new = dict(_leaves(before)), dict(_leaves(now))
    changed = [key for key in new if key in old and old[key] != new[key]]
    refused = [(key, fixed) for key in changed for fixed in FIXED if f"{key}.".startswith(f"{fixed}.")]
    if refused:
        lines = [f"{key}: got {new[key]!r}; allowed: {old[key]!r} as in {where}: {FIXED[why]}" for key, why in refused]
        raise ConfigError("\n".join(lines))
    return [f"{key}: {old[key]!r} before, {new[key]!r} from here on" for key in changed]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
