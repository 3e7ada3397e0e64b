"""Where each piece goes and what it asks of Ray: resources, nodes, and the environment of its process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors import engine
from learner import device
from uniapl.config import Config

# Logical CPUs. On a machine that is too small for them they only count, nothing is pinned.
ENGINE_CPUS = 1
RANK_CPUS = 1
HALF = 0.5
"""Of a GPU, where engine and rank share it."""
REPLICA_CPUS = 1
OTHER_CPUS = 2
"""For the reward replicas and Ray Serve's controller."""
KINDS = ("learner", "rollout", "reward")
"""Custom resources by which a cluster's node types say what they are for (cluster/aws.yaml); one unit for each part."""


@dataclass(frozen=True)
class Site:
    """What kind of cluster it is, as far as parts are placed by it.

    Attributes:
        gpu: whether engines and ranks compute on GPUs.
        kinds: those of `KINDS` that nodes declare, or that an autoscaler could add.
    """

    gpu: bool = False
    kinds: frozenset[str] = frozenset()

    @property
    def told(self) -> str:
        """For the user of a cluster: nodes of another kind may join later, and change nothing any more."""
        why = "" if self.gpu else " (no node there has a GPU, and none that an autoscaler is known to add)"
        marked = f", where nodes are marked {', '.join(sorted(self.kinds))} on those" if self.kinds else ""
        return f"this run is placed for {'GPUs' if self.gpu else 'CPUs'}{why}{marked}"

    def mark(self, kind: str) -> dict[str, float]:
        """The custom resource that leads a part to nodes of its kind, where there are any."""
        return {kind: 1.0} if kind in self.kinds else {}


def logical_cpus(config: Config) -> int:
    """How many CPUs a Ray of its own must declare for this run to fit."""
    engines, ranks = config.rollout.most * ENGINE_CPUS, config.learner.ranks * RANK_CPUS
    return engines + ranks + OTHER_CPUS + config.reward.max_replicas


def engine_bundle(config: Config, site: Site) -> dict[str, float]:
    """What one rollout actor takes, all of it on one node."""
    if config.rollout.colocate:
        return {"CPU": float(ENGINE_CPUS), **({"GPU": HALF} if site.gpu else {})}
    gpus = {"GPU": float(config.rollout.tensor_parallel)} if site.gpu else {}
    return {"CPU": float(ENGINE_CPUS), **gpus, **site.mark("rollout")}


def rank_bundle(config: Config, site: Site) -> dict[str, float]:
    """What one learner rank takes."""
    gpus = HALF if config.rollout.colocate else 1.0
    return {"CPU": float(RANK_CPUS), **({"GPU": gpus} if site.gpu else {}), **site.mark("learner")}


def reward_bundle(site: Site) -> dict[str, float]:
    """What one reward replica takes: a CPU on nodes that are meant for it, so that many of them are demand for more.

    Elsewhere none: replicas work while the engines wait, and a small machine's CPUs are all reserved.
    """
    mark = site.mark("reward")
    return {"CPU": float(REPLICA_CPUS) if mark else 0.0, **mark}


def rollout_options(config: Config, site: Site, group: PlacementGroup | None = None) -> dict[str, Any]:
    """Ray options of one rollout actor; several are spread over the nodes, one that shares a GPU is in its group."""
    shared = PlacementGroupSchedulingStrategy(group) if group and config.rollout.colocate else None
    return _resources(engine_bundle(config, site)) | {
        "max_concurrency": config.rollout.groups_in_flight + 16,
        "scheduling_strategy": shared or "SPREAD",
        "runtime_env": {"env_vars": engine.environment(config, site.gpu)},
    }


def room(config: Config, site: Site) -> int:
    """How many more rollout actors the cluster has the resources for, as far as Ray knows by now."""
    free = ray.available_resources()
    return int(min(free.get(name, 0.0) // amount for name, amount in engine_bundle(config, site).items()))


def learner_group(config: Config, site: Site) -> PlacementGroup:
    """Room for all ranks at once, on as few nodes as possible: gathers between nodes are slow.

    An engine that shares the only rank's GPU is in the rank's bundle: halves of two could be of different GPUs.
    """
    bundle = rank_bundle(config, site)
    if config.rollout.colocate:
        bundle = dict(Counter(bundle) + Counter(engine_bundle(config, site)))
    return placement_group([bundle] * config.learner.ranks, strategy="PACK")


def learner_options(config: Config, site: Site, group: PlacementGroup | None = None) -> dict[str, Any]:
    """Ray options of one learner rank, in its placement group where there is one."""
    environment = {} if site.gpu else device.cpu_environment()
    options = _resources(rank_bundle(config, site)) | {"runtime_env": {"env_vars": environment}}
    return options | ({"scheduling_strategy": PlacementGroupSchedulingStrategy(group)} if group else {})


def beside_driver() -> dict[str, Any]:
    """Ray options of a part that belongs on the driver's own node, the head of most clusters."""
    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _resources(bundle: dict[str, float]) -> dict[str, Any]:
    custom = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "resources": custom}
