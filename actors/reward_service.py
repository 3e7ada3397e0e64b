"""The reward service: a Ray Serve application that scores groups in batches.

Callers hold the handle: `scores = await handle.score.remote(ScoreRequest(prompt, responses))`.
Nothing listens on HTTP: requests travel through Ray only. Every driver has an application of its own, by the id of its
Ray job, so that several runs may share a cluster; it ends with its driver, however that one ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from typing import Any

import ray
from ray import serve
from ray._private.state import jobs
from ray.exceptions import RayActorError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from uniapl.config import Config
from uniapl.discriminators import Discriminator, check_discriminator, open_discriminator
from uniapl.discriminators.types import Comparison
from uniapl.loglines import log_lines
from uniapl.records import Score
from uniapl.rewards import ScoreRequest, require_rewards, resolve
from uniapl.rewards.cache import open_cache, require_redis
from uniapl.rewards.scoring import Scorer
from uniapl.runlog import RunError

MAX_DISCRIMINATOR_THREADS = 4
"""A batch of some 40 short texts gains nothing from more in a sentence encoder."""
CONCURRENT_BATCHES = 4
"""Batches that one replica works on at a time, so that one slow reward does not hold up all others."""
START_ATTEMPTS = 2
HEALTH_CHECK_PERIOD_S = 2.0
"""Serve replaces a replica after three failed checks."""
DRIVER_LOOK_S = 2.0
"""How often a replica looks whether its driver lives."""
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}


class RewardReplica:
    """One replica: loads rewards, cache and discriminator once, then scores batches of groups.

    Args:
        config: the whole configuration.
        search_path: where the driver imports from; Serve's own processes know nothing of it.
        job: the driver's, with which the replica ends.
    """

    def __init__(self, config: Config, search_path: list[str], job: str) -> None:
        threading.Thread(target=_end_with_driver, args=[job], daemon=True).start()
        _no_grpc_port()
        log_lines(config.run.name, "reward")
        sys.path.extend(folder for folder in search_path if folder not in sys.path)
        rewards = resolve(config.reward.functions, config.reward.timeout_s)
        discriminator = _discriminator(config)
        self._scorer = Scorer(rewards, open_cache(config.reward), config.reward.timeout_s, discriminator)
        self._batch.set_max_batch_size(config.reward.batch_size)
        self._batch.set_batch_wait_timeout_s(config.reward.batch_wait_s)

    async def score(self, request: ScoreRequest) -> list[Score]:
        """One score per response, in order; see `records.Score` for those without a reward."""
        return await self._batch(request)

    @serve.batch(max_concurrent_batches=CONCURRENT_BATCHES)
    async def _batch(self, requests: list[ScoreRequest]) -> list[list[Score]]:
        # In a thread, so that health checks and new requests are answered meanwhile.
        return await asyncio.to_thread(self._scorer.score, requests)

    async def stats(self) -> dict[str, Any]:
        """Counters of the replica that answers; `pid` tells replicas apart."""
        return {"pid": os.getpid(), **self._scorer.stats()}

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if not self._scorer.healthy:
            raise RuntimeError("too many calls of reward functions hang; this replica wants to be replaced")


def _no_grpc_port() -> None:
    """Keep Serve's replica in this process from listening for gRPC, on all addresses of the machine.

    Ray Serve 2.60 opens that port in every replica, whether calls take it or not (ours travel through Ray), without a
    token, and loads as a pickle what comes in. There is no setting for it; the port is opened after the constructor.
    """
    from ray.serve._private import replica

    replica.add_port_to_grpc_server = lambda server, address: 0


def start_reward_service(config: Config, resources: dict[str, float] | None = None) -> DeploymentHandle:
    """Start the service on the Ray cluster that this process is connected to, and wait for it.

    Args:
        config: of the run.
        resources: of Ray's that each replica takes, CPUs among them, so that it runs on nodes that have them.

    Raises:
        ConfigError: a reward, the discriminator or Redis that the configuration names is not there.
        RunError: no replica started within `cluster.start_timeout_s` seconds; says why.
    """
    _require_parts(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the terminal belongs to the run's own table
    try:
        handle = _deploy(config, resources or {})
    except RayActorError:  # Serve was about to end with another run's end or death
        handle = _deploy(config, resources or {})
    _wait_until_running(config.cluster.start_timeout_s)
    return handle


def application(job: str | None = None) -> str:
    """The name in Serve of a driver's reward service.

    Args:
        job: the driver's; None: this process's.
    """
    return f"uniapl-reward-{job or ray.get_runtime_context().get_job_id()}"


def replica_class() -> str:
    """Begins the class names of the actors of this driver's replicas, which are of Serve's job, not of the driver's."""
    return f"ServeReplica:{application()}:"


def stop_reward_service(job: str | None = None) -> None:
    """Stop a driver's service if it runs, and Serve itself where nothing else runs on it.

    Args:
        job: the driver's; None: this process's.
    """
    name = application(job)
    try:
        found = serve.status().applications
    except RayActorError:  # it ended with another run, after this one's service
        return
    if any(other.status != ApplicationStatus.DELETING for other_name, other in found.items() if other_name != name):
        if name in found:
            serve.delete(name)
    else:
        serve.shutdown()


def _end_with_driver(job: str) -> None:
    """In a thread of a replica's: Serve's actors outlive the driver that asked for them, if nothing stops them."""
    while any(one["JobID"] == job and not one["IsDead"] for one in jobs()):
        time.sleep(DRIVER_LOOK_S)
    stop_reward_service(job)


def restart_controller() -> None:
    """End Serve's controller: Ray starts it anew, with the state that it keeps, and it looks for all its replicas."""
    ray.kill(ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE), no_restart=False)


def _deploy(config: Config, resources: dict[str, float]) -> DeploymentHandle:
    serve.start(proxy_location="Disabled", logging_config=_LOGGING)
    search_path = [folder or os.getcwd() for folder in sys.path]
    bound = _deployment(config, resources).bind(config, search_path, ray.get_runtime_context().get_job_id())
    target = serve.RunTarget(bound, name=application(), route_prefix=None)
    [handle] = serve.run_many([target], wait_for_applications_running=False)
    return handle


def _require_parts(config: Config) -> None:
    require_rewards(config.reward.functions, config.reward.timeout_s)
    if config.reward.redis_url is not None:
        require_redis(config.reward.redis_url)
    check_discriminator(config)


def _discriminator(config: Config) -> Discriminator | None:
    """The discriminator of the configuration, ready; imports torch only where it is needed."""
    discriminator = open_discriminator(config, min(MAX_DISCRIMINATOR_THREADS, len(os.sched_getaffinity(0))))
    if discriminator is not None:
        discriminator.scores([Comparison([{"role": "user", "content": "say"}], "warm", ["up"])])
    return discriminator


def _deployment(config: Config, resources: dict[str, float]) -> Any:
    reward = config.reward
    return serve.deployment(
        RewardReplica,
        name="reward",
        max_ongoing_requests=reward.batch_size * CONCURRENT_BATCHES,
        autoscaling_config={
            "min_replicas": reward.min_replicas,
            "max_replicas": reward.max_replicas,
            "target_ongoing_requests": reward.batch_size,
            "upscale_delay_s": 5.0,
            "downscale_delay_s": 120.0,
        },
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=2.0,
        max_constructor_retry_count=START_ATTEMPTS,
        logging_config=_LOGGING,
        # Idle OpenMP threads sleep: spinning they would take the engine's cores.
        ray_actor_options={
            "num_cpus": resources.get("CPU", 0.0),
            "resources": {name: amount for name, amount in resources.items() if name != "CPU"},
            "runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
        },
    )


def _wait_until_running(timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        found = serve.status().applications.get(application())
        status = found.status if found else None
        if status == ApplicationStatus.RUNNING:
            return
        if status == ApplicationStatus.DEPLOY_FAILED or time.monotonic() > deadline:
            message = _message(found)
            stop_reward_service()
            what = "failed to start" if status == ApplicationStatus.DEPLOY_FAILED else f"not up after {timeout_s:g} s"
            allowed = "one that starts within cluster.start_timeout_s; `uniapl doctor CONFIG` checks what it needs"
            raise RunError(f"reward service {what}: {message}; allowed: {allowed}")
        time.sleep(0.1)


def _message(found: Any) -> str:
    """Serve's account of an application, less the tracebacks: the last line of each part."""
    if found is None:
        return "no status from Ray Serve"
    parts = [found.message, *(deployment.message for deployment in found.deployments.values())]
    last = [part.strip().splitlines()[-1].strip() for part in parts if part.strip()]
    return "; ".join(dict.fromkeys(last)) or f"status {found.status.value}"
