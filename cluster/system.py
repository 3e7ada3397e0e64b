"""The running pieces of one training run, started side by side and ended together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from actors.queue import BatchRefs, start_queue
from actors.reward_service import start_reward_service, stop_reward_service
from actors.rollout import RolloutActor
from cluster.placement import learner_options, rollout_options
from learner.group import LearnerGroup
from uniapl.config import Config
from uniapl.records import Group, Prompt

SHUTDOWN_S = 30.0


class System:
    """Queue, learner, and, where rollouts or evaluation need them, engines and the reward service."""

    def __init__(self, config: Config, gpu: bool) -> None:
        self.config = config
        self.engines: list[Any] = []
        self._production: list[Any] = []
        self._serving = False
        self.queue = start_queue(config)
        self.learner = LearnerGroup(config, learner_options(gpu))
        if config.needs_engine:
            actor = ray.remote(RolloutActor)
            self.engines = [
                actor.options(**rollout_options(config, gpu)).remote(f"rollout-{i}", config, gpu)
                for i in range(config.rollout.actors)
            ]

    def __enter__(self) -> System:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def start(self) -> dict[str, float]:
        """Load everything at once; returns the seconds that each engine took.

        Raises:
            TimeoutError: something is not up within `cluster.start_timeout_s`.
        """
        timeout = self.config.cluster.start_timeout_s
        engines = [engine.start.remote() for engine in self.engines]
        with ThreadPoolExecutor(1) as beside:
            reward = beside.submit(self._start_reward) if self.engines else None
            ranks = self.learner.start()
            self._wait(ranks + engines, timeout)
            handle = reward.result() if reward else None
        if self.engines:
            ray.get([engine.attach.remote(self.queue, handle) for engine in self.engines])
            self.learner.connect(self.engines)
        return {f"rollout-{i}": seconds for i, seconds in enumerate(ray.get(engines))}

    def _start_reward(self) -> Any:
        self._serving = True
        return start_reward_service(self.config)

    def _wait(self, calls: list[Any], timeout: float) -> None:
        """All of `calls` done, or the first error of any."""
        pending = calls
        while pending:
            done, pending = ray.wait(pending, timeout=timeout)
            if not done:
                raise TimeoutError(f"{len(pending)} of {len(calls)} processes were not up within {timeout:g} s")
            ray.get(done)

    def publish(self, version: int) -> dict[str, float]:
        """Give the engines the learner's weights as `version`, and let the queue know."""
        sent = self.learner.broadcast(version) if self.engines else {}
        ray.get(self.queue.published.remote(version))
        return sent

    def begin_rollouts(self) -> None:
        """Let the engines lease prompts."""
        if self.config.objective.uses_rollouts:
            ray.get(self.queue.set_members.remote([f"rollout-{i}" for i in range(len(self.engines))]))
            self._production = [engine.run.remote() for engine in self.engines]

    def next_batch(self) -> BatchRefs:
        """Wait for the next mixed batch; an engine that fails meanwhile ends the wait with its error.

        Raises:
            TimeoutError: no batch within `cluster.step_timeout_s`.
        """
        wait_s = self.config.cluster.step_timeout_s
        call = self.queue.next_batch.remote(wait_s)
        done, _ = ray.wait([call, *self._production], num_returns=1, timeout=wait_s + SHUTDOWN_S)
        ended = [ref for ref in done if ref != call]
        if ended:
            ray.get(ended)
            raise RuntimeError("a rollout actor stopped producing before the run was over")
        batch = ray.get(call) if done else None
        if batch is None:
            raise TimeoutError(f"no batch within {wait_s:g} s (cluster.step_timeout_s)")
        return batch

    def evaluate(self, prompts: list[Prompt], samples: int, temperature: float) -> list[Group]:
        """Scored samples of `prompts`, shared out over the engines, in the order of `prompts`."""
        n = len(self.engines)
        shares = [(i, prompts[i::n]) for i in range(n)]
        made = ray.get([self.engines[i].evaluate.remote(share, samples, temperature) for i, share in shares])
        groups: list[Group | None] = [None] * len(prompts)
        for (i, _), share in zip(shares, made, strict=True):
            groups[i::n] = share
        return [g for g in groups if g is not None]

    def stats(self) -> dict[str, Any]:
        """The queue's counters."""
        return ray.get(self.queue.stats.remote())

    def shutdown(self) -> None:
        """End every process of the run; what does not end by itself within 30 s is killed."""
        stops = [self.queue.stop.remote(), *(engine.shutdown.remote() for engine in self.engines)]
        ray.wait(stops, num_returns=len(stops), timeout=SHUTDOWN_S)
        for actor in (self.queue, *self.engines, *self.learner.ranks):
            ray.kill(actor)
        # A Ray of our own ends with everything in it; on a shared one Serve would stay behind.
        if self._serving and self.config.cluster.address != "local":
            stop_reward_service()
