"""The running pieces of one training run, started side by side and ended together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.placement_group import remove_placement_group

from actors.packed import PackedBatch
from actors.queue import start_queue
from actors.reward_service import start_reward_service, stop_reward_service
from cluster.fleet import Engine, Fleet
from cluster.heldout import Sampling
from cluster.placement import Site, beside_driver, learner_group, learner_options, reward_bundle
from cluster.ray_session import own_ray
from cluster.room import Waiting, wait_for_room
from cluster.wall_clock import RewardWatch, WallClock
from learner.group import LearnerGroup
from uniapl.broadcast_result import Sent
from uniapl.config import Config
from uniapl.records import Group, Prompt

SHUTDOWN_S = 30.0
GONE_S = 5.0
"""Within this time Ray knows of an actor that died."""
POLL_S = 1.0
"""How often the fleet is looked at while something else is waited for; an engine's end is noticed at once."""


class System:
    """Queue, learner, and, where rollouts or evaluation need them, engines and the reward service.

    Args:
        config: of the run.
        site: how parts are placed.
        note: called with a line for the user when an engine is lost.
        left: seconds that are left for the end.
    """

    def __init__(
        self, config: Config, site: Site, note: Callable[[str], None], left: Callable[[], float] = lambda: SHUTDOWN_S
    ) -> None:
        self.config = config
        self._version = 0
        self._site = site
        self._serving = False
        self._connected: list[Engine] = []
        self._cut: set[Engine] = set()
        self._note = note
        self._left = left
        self._waiting = Waiting(config, note)
        self._rewards: RewardWatch | None = None
        self._clock = WallClock(note)
        self.queue = start_queue(config, options=beside_driver())
        self._room = learner_group(config, site)
        self.learner = LearnerGroup(config, learner_options(config, site, self._room))
        self.fleet = Fleet(config, site, self.queue, note, self._room)

    def __enter__(self) -> System:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    @property
    def engines(self) -> dict[str, Any]:
        """The members of the fleet by name."""
        return {engine.name: engine.handle for engine in self.fleet.members}

    def start(self) -> None:
        """Load everything at once; done when the learner and `rollout.min_actors` engines are up.

        Raises:
            TimeoutError, RunError: something is not up within `cluster.start_timeout_s`.
        """
        in_turns = self.config.rollout.colocate  # vLLM measures the GPU's free memory while it loads
        if not in_turns:
            self.fleet.start()
        with ThreadPoolExecutor(1) as beside:
            reward = beside.submit(self._start_reward) if self.config.needs_engine else None
            wait_for_room(self._room, self.config, self._note)
            self._wait(self.learner.check_paths())
            self._wait(self.learner.start())
            if in_turns:
                self.fleet.start()
            while not self.fleet.enough:  # within the fleet's own limit
                self.fleet.wait([], POLL_S)
                self.fleet.poll()
                self._waiting.look()
            while reward and not futures.wait([reward], timeout=POLL_S).done:  # within its own limit
                self._waiting.look()
            handle = reward.result() if reward else None
        least, renew = self.config.reward.min_replicas, self.fleet.renew_reward
        self._rewards = RewardWatch(least, self._note, renew) if handle else None
        self._connect()
        self.fleet.admit(handle)  # the first weights come with the check of the round trip

    def _start_reward(self) -> Any:
        self._serving = True
        return start_reward_service(self.config, reward_bundle(self._site))

    def _wait(self, calls: list[Any]) -> None:
        """All of `calls` done, or the first error of any."""
        pending, limit = calls, self.config.cluster.start_timeout_s
        began = time.monotonic()
        while pending:
            done, pending = ray.wait(pending, timeout=POLL_S)
            self._waiting.look()
            if not done and time.monotonic() - began > limit:
                late = f"{len(pending)} of {len(calls)} learner ranks"
                raise TimeoutError(f"{late} were not up within {limit:g} s (cluster.start_timeout_s)")
            ray.get(done)

    def publish(self, version: int) -> dict[str, float]:
        """Give the engines the learner's weights as `version`, and let the queue know."""
        self._version = version
        sent = self.send(version)
        self.answer(self.queue.published.remote(version))
        return sent

    def send(self, version: int, vector_scale: float = 1.0) -> dict[str, float]:
        """Send the learner's weights to all engines that are up, newcomers among them, and no other ones.

        Args:
            version: what the engines call them from now on.
            vector_scale: as in `LearnerGroup.broadcast`.

        Returns:
            metrics of the broadcast and of the fleet.
        """
        if not self.config.needs_engine:
            return {}
        self.fleet.poll()
        self._connect()
        sent: dict[str, float] = {}
        if self.fleet.up:
            result = self.learner.broadcast(version, vector_scale)
            self._lose(result)
            self.fleet.admit()
            sent = result.metrics
        return sent | self.fleet.metrics()

    def _connect(self) -> None:
        """Form the weight group anew where other engines are up than are in it."""
        up = self.fleet.up
        if up and up != [engine for engine in self._connected if engine not in self._cut]:
            self._connected, self._cut = up, set()
            self._lose(self.learner.connect([engine.handle for engine in up]))

    def _lose(self, sent: Sent) -> None:
        """End the engines that the learner has cut off."""
        for place, reason in sent.lost.items():
            self._cut.add(self._connected[place])
            self.fleet.lose(self._connected[place], reason)

    def begin_rollouts(self) -> None:
        """Let the engines lease prompts."""
        if self.config.objective.uses_rollouts:
            self.answer(self.queue.set_members.remote([engine.name for engine in self.fleet.members]))
            self.fleet.begin()

    def next_batch(self) -> PackedBatch:
        """Wait for the next mixed batch; engines that are lost meanwhile are started again.

        Raises:
            TimeoutError: no batch within `cluster.step_timeout_s`.
            RunError: fewer engines than `rollout.min_actors` can be kept.
        """
        self._clock.look()
        wait_s = self.config.cluster.step_timeout_s
        call, deadline = self.queue.next_batch.remote(wait_s), time.monotonic() + wait_s + SHUTDOWN_S
        while not self.fleet.wait([call], POLL_S) and time.monotonic() < deadline:
            self._look_after()
        batch = self.answer(call, POLL_S)
        if batch is None:
            raise TimeoutError(f"no batch within {wait_s:g} s (cluster.step_timeout_s)")
        return batch

    def _look_after(self) -> None:
        """Notice losses; when every member is lost, newcomers get the present weights at once, not at a publish."""
        self._look_at_rewards()
        self.fleet.poll()
        if self.fleet.up and not self.fleet.members:
            self.send(self._version)

    def _look_at_rewards(self) -> None:
        if self._rewards:
            self._rewards.look()

    @contextmanager
    def learners_turn(self) -> Iterator[None]:
        """Where engine and learner share a GPU it is the learner's in the body; after an error the run is over."""
        if self.config.rollout.colocate:
            self.fleet.each("sleep")
        yield
        if self.config.rollout.colocate:
            self.fleet.each("wake_up")

    def evaluate(self, prompts: list[Prompt], samples: int, temperature: float) -> list[Group]:
        """Scored samples of `prompts`, shared out over the engines, in the order of `prompts`.

        What a lost engine leaves undone is done by the others, or by the one that comes in its place.
        """
        sampling = Sampling(self.fleet, self.config, prompts, samples, temperature)
        while not sampling.poll():
            self._look_at_rewards()
            if self.fleet.members:
                sampling.wait(POLL_S)
            else:
                self.fleet.wait([], POLL_S)
                self._look_after()
        return sampling.groups

    def stats(self) -> dict[str, Any]:
        """The queue's counters."""
        return self.answer(self.queue.stats.remote())

    def answer(self, call: Any, left_s: float | None = None) -> Any:
        """What the queue answers.

        Args:
            left_s: of the limit, where some of it is over; None: all.

        Raises:
            TimeoutError: nothing within `cluster.step_timeout_s`; it is alive then, but does not run.
        """
        limit = self.config.cluster.step_timeout_s
        try:
            return ray.get(call, timeout=limit if left_s is None else left_s)
        except GetTimeoutError:
            raise TimeoutError(f"the queue gave no answer within {limit:g} s (cluster.step_timeout_s)") from None

    def gone(self) -> list[str]:
        """Which of the parts that are there once have died."""
        calls = {"the queue actor": self.queue.usage.remote()}
        calls |= {f"learner rank {number}": rank.address.remote() for number, rank in enumerate(self.learner.ranks)}
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=GONE_S)
        found = []
        for name, call in calls.items():
            try:
                ray.get(call, timeout=0)
            except GetTimeoutError:  # it is at work
                continue
            except RayActorError:
                found.append(name)
        return found

    def shutdown(self) -> None:
        """End every process of the run; what does not end by itself within 30 s, or half of what is left, is killed."""
        stops = [self.queue.stop.remote(), *self.fleet.shutdown()]
        ray.wait(stops, num_returns=len(stops), timeout=min(SHUTDOWN_S, self._left() / 2))
        self.fleet.kill()
        for actor in (self.queue, *self.learner.ranks):
            ray.kill(actor)
        remove_placement_group(self._room)
        # A Ray of our own ends with everything in it; on a shared one Serve would stay behind.
        if self._serving and not own_ray(self.config):
            stop_reward_service()
