"""Whether a run fits on the cluster: what is missing is told at once, or what is being waited for, and how long."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import ray
from ray._private.state import actors
from ray.util.placement_group import PlacementGroup

from actors.reward_service import replica_class
from cluster.autoscaler import Limit, Resources
from cluster.placement import KINDS, Site, engine_bundle, rank_bundle, reward_bundle
from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.runlog import RunError

LOOK_S = 1.0
PATIENCE_S = 5.0
"""Before the user is told that something is waited for."""


class Need(NamedTuple):
    """So many times `bundle`, each on one node."""

    what: str
    key: str
    bundle: Resources
    times: int


def needs(config: Config, site: Site) -> list[Need]:
    """What the run cannot begin without."""
    found = [Need("learner", "learner.ranks", rank_bundle(config, site), config.learner.ranks)]
    if config.needs_engine:
        if "reward" in site.kinds:
            bundle, least = reward_bundle(site), config.reward.min_replicas
            found.append(Need("reward replicas", "reward.min_replicas", bundle, least))
        key = "rollout.actors" if config.rollout.min_actors is None else "rollout.min_actors"
        found.append(Need("engines", key, engine_bundle(config, site), config.rollout.least))
    return found


def check_room(needed: list[Need], nodes: list[Resources], limit: Limit | None) -> None:
    """Compare what is needed with what the cluster can ever have.

    Args:
        needed: of the run.
        nodes: of the cluster as it is.
        limit: None: no nodes come but those that are there.

    Raises:
        ConfigError: more is needed, one line for each resource or part.
    """
    lines = [*_too_many(needed, nodes, limit), *_too_large(needed, nodes, limit)]
    if lines := lines or [*_no_places(needed, nodes, limit)]:
        raise ConfigError("\n".join(lines))


def _too_many(needed: list[Need], nodes: list[Resources], limit: Limit | None) -> Iterator[str]:
    """Resources of which all parts together need more than all nodes have."""
    for resource in sorted({name for need in needed for name in need.bundle} - set(KINDS)):
        parts = [(need, need.bundle.get(resource, 0.0) * need.times) for need in needed]
        wanted = sum(amount for _, amount in parts)
        has, most = _sums(lambda node: node.get(resource, 0.0), nodes, limit)  # noqa: B023 (called at once)
        if wanted > max(has, most):
            split = " and ".join(f"{amount:g} for the {need.what} ({need.key})" for need, amount in parts if amount)
            yield f"cluster: needs {wanted:g} {resource}, {split}; the cluster has {has:g}{_limited(most, limit)}"


def _too_large(needed: list[Need], nodes: list[Resources], limit: Limit | None) -> Iterator[str]:
    """Parts that no single node of those that are meant for them could hold."""
    possible = [*nodes, *([limit.head, *limit.workers] if limit else [])]
    for need in needed:
        marks = {kind: need.bundle[kind] for kind in KINDS if kind in need.bundle}
        meant = [node for node in possible if _times(marks, node)]
        asked = need.bundle if meant else marks
        of_kind = f" of those for it (`{'`, `'.join(marks)}`)" if meant and marks else ""
        for resource, amount in asked.items():
            largest = max((node.get(resource, 0.0) for node in meant or possible), default=0.0)
            if amount > largest:
                what = f"cluster: needs nodes with {amount:g} {resource} for the {need.what}"
                yield f"{what}; none{of_kind} has over {largest:g}"


def _no_places(needed: list[Need], nodes: list[Resources], limit: Limit | None) -> Iterator[str]:
    """Parts that are more than the nodes that are meant for them could hold, were nothing else there."""
    for need in needed:
        has, most = _sums(lambda node: _times(need.bundle, node), nodes, limit)  # noqa: B023 (called at once)
        if need.times > max(has, most):
            each = ", ".join(f"{amount:g} {resource}" for resource, amount in need.bundle.items())
            room = f"its nodes have room for {has:g}{_limited(most, limit)}"
            yield f"cluster: needs {need.times} × ({each}) for the {need.what} ({need.key}); {room}"


def _times(bundle: Resources, node: Resources) -> float:
    """How many such bundles a node holds."""
    return min((node.get(name, 0.0) // amount for name, amount in bundle.items()), default=math.inf)


def _sums(amount: Callable[[Resources], float], nodes: list[Resources], limit: Limit | None) -> tuple[float, float]:
    """What the nodes have that are there, and those that there may be."""
    return sum(map(amount, nodes)), limit.most(amount) if limit else 0.0


def _limited(most: float, limit: Limit | None) -> str:
    return f", the autoscaler's limit is {most:g}" if limit else ""


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


class Waiting:
    """Tells what Ray has found no node for, once it has waited for a while, and again when that changes.

    Args:
        config: of the run.
        note: called with a line for the user.
    """

    def __init__(self, config: Config, note: Callable[[str], None]) -> None:
        self._config = config
        self._note = note
        self._began = time.monotonic()
        self._told: Counter[str] = Counter()

    def look(self) -> None:
        if time.monotonic() - self._began < PATIENCE_S or (without := _without_node()) == self._told:
            return
        self._told = without
        if without:
            limit = self._config.cluster.start_timeout_s
            missing = " and ".join(f"{name} ({number})" for name, number in sorted(without.items()))
            self._note(
                f"waiting for nodes: none yet for {missing}, see `ray status`; the run begins with "
                f"{self._config.rollout.least} engines, within {limit:g} s (cluster.start_timeout_s)"
            )


def _without_node() -> Counter[str]:
    """This run's actors that are not on a node yet."""
    job, names, replica = ray.get_runtime_context().get_job_id(), {"RolloutActor": "rollout actors"}, replica_class()
    return Counter(
        names.get(actor["ActorClassName"], "reward replicas")
        for actor in actors().values()
        if actor["State"] in ("DEPENDENCIES_UNREADY", "PENDING_CREATION") and not actor["Pid"]
        if (actor["JobID"] == job and actor["ActorClassName"] in names) or replica in actor["ActorClassName"]
    )
