"""Keys of a configuration whose values cannot go together."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from uniapl.config_errors import masked
from uniapl.config_types import REDIS_PASSWORD
from uniapl.logging_config import logging_conflicts
from uniapl.objective_config import objective_conflicts
from uniapl.queue_config import queue_conflicts
from uniapl.storage import url_conflicts

if TYPE_CHECKING:
    from uniapl.config import Config

LONGEST_S = 1e9
"""Seconds; Python's locks take no more than 9.2e9."""


def conflicts(c: Config) -> list[str]:
    """Pairs of keys whose values cannot go together, each as one line."""
    o, q = c.objective, c.queue
    found = objective_conflicts(o)
    if o.shapes_rewards and q.on_equal_rewards == "resample":
        found.append(
            "queue.on_equal_rewards: got 'resample'; allowed: 'keep' when objective.adversarial.as_reward is true: "
            "the expert score tells samples of equal reward apart"
        )
    if o.uses_rollouts and q.groups_per_step == 0:
        found.append("queue.groups_per_step: got 0; allowed: > 0 when any weight but the demonstrations' is > 0")
    if o.uses_demonstrations and q.demonstrations_per_step == 0:
        found.append("queue.demonstrations_per_step: got 0; allowed: > 0 when objective.demonstration.weight is > 0")
    if o.uses_rollouts and c.rollout.group_size == 1:
        found.append("rollout.group_size: got 1; allowed: >= 2, one sample has no advantage within its group")
    found += queue_conflicts(q, c.rollout.group_size, o.surrogate) + _wait_conflicts(c) + _colocation_conflicts(c)
    if c.rollout.least > c.rollout.actors:
        found.append(f"rollout.min_actors: got {c.rollout.least}; allowed: <= rollout.actors = {c.rollout.actors}")
    if c.rollout.most < c.rollout.actors:
        found.append(f"rollout.max_actors: got {c.rollout.most}; allowed: >= rollout.actors = {c.rollout.actors}")
    longest = c.data.max_prompt_tokens + c.rollout.max_tokens
    if longest > c.rollout.max_model_len:
        found.append(
            f"rollout.max_model_len: got {c.rollout.max_model_len}; "
            f"allowed: >= data.max_prompt_tokens + rollout.max_tokens = {longest}"
        )
    longest = c.data.max_prompt_tokens + max(c.rollout.max_tokens, c.data.max_response_tokens)
    if longest > c.learner.row_tokens:
        found.append(
            f"learner.row_tokens: got {c.learner.row_tokens}; "
            f"allowed: >= the longest prompt and response together = {longest}"
        )
    if c.reward.max_replicas < c.reward.min_replicas:
        least = f"reward.min_replicas = {c.reward.min_replicas}"
        found.append(f"reward.max_replicas: got {c.reward.max_replicas}; allowed: >= {least}")
    found += _redis_conflicts(c.reward.redis_url) + logging_conflicts(c.logging)
    names = [function.name for function in c.reward.functions]
    for name in sorted({name for name in names if names.count(name) > 1}):
        found.append(f"reward.functions: got '{name}' {names.count(name)} times; allowed: each name once")
    if c.learner.warmup_steps > c.run.steps:
        found.append(f"learner.warmup_steps: got {c.learner.warmup_steps}; allowed: <= run.steps = {c.run.steps}")
    places = {"run.folder": [c.run.folder], "data.train": c.data.train, "data.heldout": c.data.heldout}
    return found + _evaluation_conflicts(c) + _endless(c) + url_conflicts(places)


def _colocation_conflicts(c: Config) -> list[str]:
    """One engine and one rank take turns; what would have both at work at once is refused."""
    if not c.rollout.colocate:
        return []
    values = {
        "queue.max_staleness": (c.queue.max_staleness, 0),
        "evaluation.every": (c.evaluation.every, 0),
        "learner.ranks": (c.learner.ranks, 1),
        "rollout.actors": (c.rollout.actors, 1),
        "rollout.max_actors": (c.rollout.most, 1),
        "rollout.tensor_parallel": (c.rollout.tensor_parallel, 1),
    }
    wrong = [(key, got, only) for key, (got, only) in values.items() if got != only]
    return [f"{key}: got {got}; allowed: {only} when rollout.colocate is true" for key, got, only in wrong]


def _evaluation_conflicts(c: Config) -> list[str]:
    found = []
    if c.evaluation.prompts > 0 and not c.data.heldout:
        found.append("data.heldout: got []; allowed: at least one shard when evaluation.prompts is > 0")
    if c.evaluation.every > 0 and c.evaluation.prompts == 0:
        found.append(f"evaluation.every: got {c.evaluation.every}; allowed: 0 when evaluation.prompts is 0")
    return found


def _wait_conflicts(c: Config) -> list[str]:
    """Engines that finish their running responses first, longer than a broadcast waits for an engine."""
    longest, limit = c.queue.sampling_s, c.cluster.broadcast_timeout_s
    if c.rollout.update_mode != "wait" or longest < limit:
        return []
    return [
        f"rollout.update_mode: got 'wait'; allowed: when queue.group_timeout_s (here {longest:g}) "
        f"< cluster.broadcast_timeout_s = {limit:g}"
    ]


def _redis_conflicts(url: str | None) -> list[str]:
    """Secrets in the address: what the configuration holds stands in the run's folder, for all to read."""
    key = f"reward.redis_url: got '{masked(url or '')}'"
    try:
        parts = urlsplit(url or "")
        secret = parts.password is not None or any("password" in name for name in parse_qs(parts.query))
    except ValueError as error:
        return [f"{key}; {error}"]
    return [f"{key}; allowed: no password, it is read from the environment: {REDIS_PASSWORD}"] if secret else []


def _endless(c: Config) -> list[str]:
    """Times that no clock of the system takes as a limit."""
    times = {
        f"{section}.{key}": value
        for section in type(c).model_fields
        for key, value in getattr(c, section)
        if key.endswith("_s") and isinstance(value, float)
    }
    return [
        f"{key}: got {value:g}; allowed: <= {LONGEST_S:g}, in seconds"
        for key, value in times.items()
        if value > LONGEST_S
    ]
