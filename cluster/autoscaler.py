"""What an autoscaler may make of the cluster that this process is connected to, as far as it can be known."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ray
import requests
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

from cluster.placement import KINDS, Site

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves the cluster's configuration on the head."""
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
Resources = dict[str, float]


class Limit(NamedTuple):
    """What an autoscaler may make of a cluster."""

    head: Resources
    workers: list[Resources]
    """One entry for every node that its type allows."""
    at_most: int
    """Workers at a time."""

    def most(self, amount: Callable[[Resources], float]) -> float:
        """The most that all nodes can have together of what `amount` says of one."""
        amounts = sorted(map(amount, self.workers), reverse=True)
        return amount(self.head) + sum(amounts[: self.at_most])


def autoscaler_limit(bootstrap: Path = BOOTSTRAP) -> Limit | None:
    """Known on the head of a cluster that `ray up` or KubeRay made; else None.

    Ray's autoscalers tell the cluster nothing of it (`get_cluster_config()` is None in Ray 2.60), so that it is read
    where they read it themselves.
    """
    try:
        return limit_of(_ray_cluster() or yaml.safe_load(bootstrap.expanduser().read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
        return None


def limit_of(tree: dict[str, Any]) -> Limit:
    """Of an autoscaler's configuration, in the form of the files for `ray up`."""
    types, at_most = tree["available_node_types"], int(tree["max_workers"])
    head = types[tree["head_node_type"]]
    workers: list[Resources] = []
    for kind in (kind for kind in types.values() if kind is not head):
        workers += [_amounts(kind)] * int(kind.get("max_workers", at_most))
    return Limit(_amounts(head), workers, at_most)


def _ray_cluster() -> dict[str, Any] | None:
    """KubeRay's RayCluster that this pod is the head of, read as Ray's autoscaler beside it in the pod does.

    KubeRay gives a head with an autoscaler the right to read it; in another pod, and without one, there is none.
    """
    name = os.environ.get("RAY_CLUSTER_NAME")
    if name is None or not POD_NAMESPACE.is_file():
        return None
    client = KubernetesHttpApiClient(POD_NAMESPACE.read_text(encoding="utf-8").strip(), "v1")
    try:
        found = client.get(f"rayclusters/{name}")
    except (OSError, requests.RequestException) as error:
        what = "the RayCluster, and what its autoscaler may add, could not be read"
        warnings.warn(f"{what}: {error}; parts are placed by the nodes that are there by now", stacklevel=2)
        return None
    return _derive_autoscaling_config_from_ray_cr(found) if found["spec"].get("enableInTreeAutoscaling") else None


def _amounts(node_type: dict[str, Any]) -> Resources:
    return {name: float(amount) for name, amount in (node_type.get("resources") or {}).items()}


def open_site(limit: Limit | None) -> Site:
    """How parts are placed on the cluster that this process is connected to."""
    offered = set(ray.cluster_resources())
    for node in [limit.head, *limit.workers] if limit else []:
        offered |= {name for name, amount in node.items() if amount > 0}
    return Site("GPU" in offered, frozenset(offered.intersection(KINDS)))
