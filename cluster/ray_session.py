"""Connecting to Ray: one of our own on this machine, or a cluster that runs already."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, worker
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # (no stubs)
from ray.job_config import JobConfig

from cluster.autoscaler import autoscaler_limit, open_site
from cluster.debug import keep_logs, of_workers
from cluster.job import in_job
from cluster.placement import Site, logical_cpus
from cluster.room import check_room, needs
from uniapl.config import Config
from uniapl.config_errors import ConfigError

# Ray would start an idle worker per CPU; ours all have an environment of their own and could not use them.
NO_PRESTART = {"enable_worker_prestart": False, "prestart_worker_first_driver": False}
LOOPBACK = {
    ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
}
"""Read by Ray, gloo and vLLM in all processes of a run, which would else listen at the machine's outer address."""
TOKEN_BYTES = 32


@contextmanager
def ray_session(config: Config, debug: bool = False) -> Iterator[Site]:
    """Be connected to Ray inside the block; yields how parts are placed there.

    With `cluster.address: local` Ray is started here and ended with the block, also by an exception. It listens on
    127.0.0.1 alone and answers nobody without the run's token.

    Args:
        config: of the run.
        debug: see `cluster.debug`. A Ray that is started here then takes this user's token instead of one of the
            run's own, so that `ray debug` gets in.

    Raises:
        ConfigError: nothing answers at `cluster.address`, or the cluster can never hold the run.
    """
    logs = config.run_dir / "logs" if debug else None
    if own_ray(config):
        with _closed_to_others(own_token=not debug), _connected("local", logs, **_options(config)):
            nodes = [node["Resources"] for node in ray.nodes()]
            site = open_site(None)
            check_room(needs(config, site), nodes, None)
            yield site
    else:
        address = "auto" if config.cluster.address == "local" else config.cluster.address
        with _connected(address, logs):
            limit = autoscaler_limit()
            site = open_site(limit)
            if limit:  # else further nodes may be joining
                check_room(needs(config, site), [n["Resources"] for n in ray.nodes() if n["Alive"]], limit)
            yield site


def own_ray(config: Config) -> bool:
    """Whether the run starts a Ray of its own: with `cluster.address: local`, but not within a Ray job."""
    return config.cluster.address == "local" and not in_job()


@contextmanager
def _connected(address: str, logs: Path | None, **options: Any) -> Iterator[None]:
    """Args: logs: where what the parts print is kept, and shown meanwhile; None: neither, as they are not debugged."""
    if logs is not None:
        options["runtime_env"] = of_workers()
    try:
        ray.init(address=address, log_to_driver=logs is not None, logging_level="error", **options)
    except ConnectionError as error:
        allowed = "allowed: local, or an address where `ray status` answers"
        raise ConfigError(f"cluster.address: got '{address}', no Ray answers there: {error}; {allowed}") from None
    session, job = Path(worker.global_worker.node.get_session_dir_path()), ray.get_runtime_context().get_job_id()
    try:
        yield
    finally:
        ray.shutdown()
        if logs is not None:
            keep_logs(session, job, logs)


def _options(config: Config) -> dict[str, Any]:
    return {
        "num_cpus": logical_cpus(config),
        "include_dashboard": False,
        "object_store_memory": int(config.cluster.object_store_gib * 2**30),
        "_system_config": NO_PRESTART,
        # Ray would else put the current folder before everything else on the path of every worker.
        "job_config": JobConfig(_client_job=True),
    }


@contextmanager
def _closed_to_others(own_token: bool = True) -> Iterator[None]:
    """A Ray that is started inside of the block serves this machine alone, and those alone who have its token.

    Ray 2.60 asks for a token where RAY_AUTH_MODE does not say otherwise, by default one that it keeps in the user's
    home for all its clusters; with `own_token` it is one of this run, and stands nowhere but in its processes'
    environment. Ray takes 127.0.0.1 for its own address where clusters are not enabled (its default on macOS), and
    not when asked to.
    """
    before = dict(os.environ)
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.pop("RAY_AUTH_MODE", None)
    os.environ.update(LOOPBACK)
    if own_token:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(TOKEN_BYTES)
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment when Ray was imported
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", *LOOPBACK):
            os.environ.pop(name, None)
            os.environ.update({name: before[name]} if name in before else {})
        AuthenticationTokenLoader.instance().reset_cache()
