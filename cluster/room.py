"""Whether a run fits on the cluster: what is missing is told at once, or what is being waited for, and how long."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray
import yaml
from ray.util.placement_group import PlacementGroup

from cluster.placement import KINDS, Site, engine_bundle, rank_bundle
from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.runlog import RunError

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves the cluster's configuration on the head."""
LOOK_S = 1.0
PATIENCE_S = 5.0
"""Before the user is told that something is waited for."""
Resources = dict[str, float]


class Need(NamedTuple):
    """So many times `bundle`, each on one node."""

    what: str
    key: str
    bundle: Resources
    times: int


def needs(config: Config, site: Site) -> list[Need]:
    """What the run cannot begin without."""
    found = [Need("learner", "learner.ranks", rank_bundle(site), config.learner.ranks)]
    if config.needs_engine:
        key = "rollout.actors" if config.rollout.min_actors is None else "rollout.min_actors"
        found.append(Need("engines", key, engine_bundle(config, site), config.rollout.least))
    return found


class Limit(NamedTuple):
    """What an autoscaler may make of a cluster."""

    head: Resources
    workers: list[Resources]
    """One entry for every node that its type allows."""
    at_most: int
    """Workers at a time."""

    def most(self, resource: str) -> float:
        amounts = sorted((node.get(resource, 0.0) for node in self.workers), reverse=True)
        return self.head.get(resource, 0.0) + sum(amounts[: self.at_most])


def autoscaler_limit(bootstrap: Path = BOOTSTRAP) -> Limit | None:
    """Known where this is the head of a cluster that `ray up` made; else None."""
    try:
        tree = yaml.safe_load(bootstrap.expanduser().read_text(encoding="utf-8"))
        types, at_most = tree["available_node_types"], int(tree["max_workers"])
        head = types[tree["head_node_type"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
    workers: list[Resources] = []
    for kind in (kind for kind in types.values() if kind is not head):
        workers += [_amounts(kind)] * int(kind.get("max_workers", at_most))
    return Limit(_amounts(head), workers, at_most)


def _amounts(node_type: dict[str, Any]) -> Resources:
    return {name: float(amount) for name, amount in (node_type.get("resources") or {}).items()}


def open_site(limit: Limit | None) -> Site:
    """How parts are placed on the cluster that this process is connected to."""
    offered = set(ray.cluster_resources())
    for node in [limit.head, *limit.workers] if limit else []:
        offered |= {name for name, amount in node.items() if amount > 0}
    return Site("GPU" in offered, frozenset(offered.intersection(KINDS)))


def check_room(needed: list[Need], nodes: list[Resources], limit: Limit | None) -> None:
    """Compare what is needed with what the cluster can ever have.

    Args:
        needed: of the run.
        nodes: of the cluster as it is.
        limit: None: no nodes come but those that are there.

    Raises:
        ConfigError: more is needed, one line for each resource.
    """
    if lines := [*_too_many(needed, nodes, limit), *_too_large(needed, nodes, limit)]:
        raise ConfigError("\n".join(lines))


def _too_many(needed: list[Need], nodes: list[Resources], limit: Limit | None) -> Iterator[str]:
    for resource in sorted({name for need in needed for name in need.bundle} - set(KINDS)):
        parts = [(need, need.bundle.get(resource, 0.0) * need.times) for need in needed]
        wanted, has = sum(amount for _, amount in parts), sum(node.get(resource, 0.0) for node in nodes)
        if wanted > max(has, limit.most(resource) if limit else 0.0):
            split = " and ".join(f"{amount:g} for the {need.what} ({need.key})" for need, amount in parts if amount)
            most = f", the autoscaler's limit is {limit.most(resource):g}" if limit else ""
            yield f"cluster: needs {wanted:g} {resource}, {split}; the cluster has {has:g}{most}"


def _too_large(needed: list[Need], nodes: list[Resources], limit: Limit | None) -> Iterator[str]:
    """Parts that no single node could hold."""
    possible = [*nodes, *([limit.head, *limit.workers] if limit else [])]
    for need in needed:
        for resource, amount in need.bundle.items():
            largest = max((node.get(resource, 0.0) for node in possible), default=0.0)
            if amount > largest:
                yield f"cluster: needs nodes with {amount:g} {resource} for the {need.what}; none has over {largest:g}"


def wait_for_room(group: PlacementGroup, config: Config, note: Callable[[str], None]) -> None:
    """Wait until the learner's nodes are there, within `cluster.start_timeout_s`; says so if it takes a while.

    Raises:
        RunError: they are not there in time.
    """
    limit, began, told = config.cluster.start_timeout_s, time.monotonic(), False
    while not group.wait(math.ceil(LOOK_S)):
        if time.monotonic() - began > limit:
            raise RunError(
                f"{_waiting(group)}, not there within {limit:g} s (cluster.start_timeout_s)"
                "; allowed: machines that have it, fewer ranks, or more time"
            )
        if not told and time.monotonic() - began > PATIENCE_S:
            note(f"waiting for nodes: {_waiting(group)}; for at most {limit:g} s (cluster.start_timeout_s)")
            told = True


def _waiting(group: PlacementGroup) -> str:
    bundles, has = group.bundle_specs, ray.cluster_resources()
    free = ray.available_resources()
    parts = [
        f"{sum(bundle.get(name, 0) for bundle in bundles):g} {name} (of {has.get(name, 0):g} in the cluster "
        f"{free.get(name, 0):g} are free)"
        for name in bundles[0]
    ]
    return f"the learner (learner.ranks: {len(bundles)}) needs {', '.join(parts)}"
