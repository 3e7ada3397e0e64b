"""What each piece asks of Ray: resources and the environment of its process."""

from __future__ import annotations

from typing import Any

import ray

from actors import engine
from learner import device
from uniapl.config import Config

# Logical CPUs. On a machine that is too small for them they only count, nothing is pinned.
ENGINE_CPUS = 1
RANK_CPUS = 1
QUEUE_CPUS = 0
OTHER_CPUS = 2
"""For the reward replicas and Ray Serve's controller."""


def logical_cpus(config: Config) -> int:
    """How many CPUs a Ray of its own must declare for this run to fit."""
    engines, ranks = config.rollout.most * ENGINE_CPUS, config.learner.ranks * RANK_CPUS
    return engines + ranks + OTHER_CPUS + config.reward.max_replicas


def rollout_options(config: Config, gpu: bool) -> dict[str, Any]:
    """Ray options of one rollout actor."""
    return {
        "num_cpus": ENGINE_CPUS,
        "num_gpus": config.rollout.tensor_parallel if gpu else 0,
        "max_concurrency": config.rollout.groups_in_flight + 16,
        "runtime_env": {"env_vars": engine.environment(config, gpu)},
    }


def room(config: Config, gpu: bool) -> int:
    """How many more rollout actors the cluster has the resources for, as far as Ray knows by now."""
    free = ray.available_resources()
    fit = free.get("CPU", 0) // ENGINE_CPUS
    return int(min(fit, free.get("GPU", 0) // config.rollout.tensor_parallel) if gpu else fit)


def learner_options(gpu: bool) -> dict[str, Any]:
    """Ray options of one learner rank."""
    environment = {} if gpu else device.cpu_environment()
    return {"num_cpus": RANK_CPUS, "num_gpus": 1 if gpu else 0, "runtime_env": {"env_vars": environment}}
