"""The rollout actors of a run: some come up late, some are lost, and the run goes on with those that are there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from actors.rollout import RolloutActor
from cluster.placement import Site, rollout_options, room
from uniapl.config import Config
from uniapl.runlog import RunError

ANSWER_S = 30.0
"""For calls that an actor answers at once."""
LASTED = 10
"""Broadcasts that an actor stays a member for, until its place may be restarted as often as at first."""
SETTLE_S = 2.0
"""What an actor takes of a cluster's free resources shows in Ray's figures within this time."""


@dataclass(eq=False)
class Engine:
    """One start of a rollout actor. `watched`: its `start()`, later its `run()`; None between the two."""

    place: int
    name: str
    handle: Any
    watched: Any
    up: bool = False
    member: bool = False
    broadcasts: int = 0
    """That it has got as a member."""


class Fleet:
    """Rollout actors in numbered places, each started again after a loss at most `rollout.max_restarts` times.

    An actor that lasted for `LASTED` broadcasts was no failed start: its place's restarts are counted from 0 again.
    Only a place that fails again and again is given up, not one that loses a machine now and then.

    An actor is *starting* until its engine is loaded, then *up*, and a *member* from the broadcast that gave it
    the learner's weights: only members generate. `rollout.actors` places are always asked for, further ones up
    to `rollout.max_actors` while the cluster has room for them. Nothing here waits for an actor that starts.

    Args:
        config: of the run.
        site: how actors are placed.
        queue: which is told whom it has lost.
        note: called with a line for the user.
        group: the learner's, for an engine that shares its GPU.
    """

    def __init__(
        self,
        config: Config,
        site: Site,
        queue: Any,
        note: Callable[[str], None],
        group: PlacementGroup | None = None,
    ) -> None:
        r = config.rollout
        self._least, self._wanted, self._most = (r.least, r.actors, r.most) if config.needs_engine else (0, 0, 0)
        self._config = config
        self._site = site
        self._queue = queue
        self._note = note
        self._group = group
        self._reward: Any = None
        self._producing = False
        self._engines: dict[int, Engine] = {}
        self._starts: Counter[int] = Counter()
        self._tries: Counter[int] = Counter()  # starts of a place since its last actor that lasted, with that one
        self._lost = 0
        self._reason = ""
        self._short_since: float | None = None
        self._launched_at = 0.0
        self._any_came_up = False

    def start(self) -> None:
        """Ask for actors; where the configuration needs none there are none."""
        self._fill()
        self._check_minimum()

    @property
    def up(self) -> list[Engine]:
        """Members and newcomers, by place."""
        return [engine for _, engine in sorted(self._engines.items()) if engine.up]

    @property
    def members(self) -> list[Engine]:
        return [engine for engine in self.up if engine.member]

    @property
    def enough(self) -> bool:
        return len(self.up) >= self._least

    def wait(self, calls: list[Any], timeout: float) -> list[Any]:
        """Those of `calls` that are done, as soon as one is, or an actor came up or failed, or after `timeout` s."""
        watched = [e.watched for e in self._engines.values() if e.watched is not None]
        if not calls and not watched:
            time.sleep(timeout)
            return []
        done, _ = ray.wait([*calls, *watched], num_returns=1, timeout=timeout)
        return [call for call in calls if call in done]

    def poll(self) -> None:
        """Notice who came up and who is lost, and ask for those that are missing.

        Raises:
            RunError: fewer than `rollout.min_actors` can be kept, or were up for `cluster.start_timeout_s`.
        """
        watched = {e.watched: e for e in self._engines.values() if e.watched is not None}
        done, _ = ray.wait(list(watched), num_returns=len(watched), timeout=0) if watched else ([], [])
        for engine in (watched[call] for call in done):
            self._ended(engine)
        self._fill()
        self._check_minimum()

    def _ended(self, engine: Engine) -> None:
        """What an actor's `start()` or `run()` gave."""
        try:
            ray.get(engine.watched)
        except RayError as error:
            if isinstance(error, RayTaskError) and not self._any_came_up:
                raise  # more likely a wrong configuration than a machine that failed
            self.lose(engine, one_line(error))
        else:
            if engine.up:
                self.lose(engine, "stopped producing before the run was over")
            else:
                self._any_came_up = engine.up = True
                engine.watched = None

    def admit(self, reward: Any = None) -> None:
        """Make members of those that are up, now that a broadcast has given all the learner's weights.

        Args:
            reward: handle of the reward service, the first time.
        """
        self._reward = reward or self._reward
        for engine in self.members:
            engine.broadcasts += 1
            if engine.broadcasts == LASTED:
                self._tries[engine.place] = 1
        newcomers = [engine for engine in self.up if not engine.member]
        # A last request for a lease may have come from the one before of the same name after it was lost.
        ray.get([self._queue.drop_actor.remote(e.name) for e in newcomers], timeout=ANSWER_S)
        calls = {e.handle.attach.remote(self._queue, self._reward): e for e in newcomers}
        for call, engine in calls.items():
            try:
                ray.get(call, timeout=ANSWER_S)
            except RayError as error:  # GetTimeoutError among them
                self.lose(engine, one_line(error))
                continue
            engine.member = True
            if self._producing:
                engine.watched = engine.handle.run.remote()

    def renew_reward(self) -> None:
        """Have the members ask the reward service by handles of their own once more, also for what they wait for."""
        for engine in self.members:
            engine.handle.attach.remote(self._queue, self._reward)  # one that is lost meanwhile is noticed by `poll`

    def begin(self) -> None:
        """Let the members, and all that become it, lease prompts."""
        self._producing = True
        for engine in self.members:
            engine.watched = engine.handle.run.remote()

    def each(self, method: str) -> None:
        """Call `method` of all that are up; those that fail, or take longer than a phase of a broadcast, are lost."""
        calls = {getattr(engine.handle, method).remote(): engine for engine in self.up}
        for call, engine in calls.items():
            try:
                ray.get(call, timeout=self._config.cluster.broadcast_timeout_s)
            except RayError as error:
                self.lose(engine, one_line(error))

    def lose(self, engine: Engine, reason: str) -> None:
        """End what is left of an actor, have its open leases leased again, and start another in its place.

        Raises:
            RunError: fewer than `rollout.min_actors` can be kept.
        """
        if self._engines.get(engine.place) is not engine:
            return  # known already
        del self._engines[engine.place]
        ray.kill(engine.handle)
        leases = ray.get(self._queue.drop_actor.remote(engine.name), timeout=ANSWER_S)
        self._lost += 1
        self._reason = f"{engine.name}: {reason}"
        left = self._config.rollout.max_restarts + 1 - self._tries[engine.place]
        then = f"started again (up to {left} times)" if left else "not started again (rollout.max_restarts)"
        self._note(f"lost {self._reason}; its {leases} open leases go to others; it is {then}")
        self._check_minimum()
        self._fill()

    def metrics(self) -> dict[str, float]:
        """Members, and how many actors were lost and started again in the run so far."""
        restarts = self._starts.total() - len(self._starts)
        return {
            "fleet/members": float(len(self.members)),
            "fleet/lost": float(self._lost),
            "fleet/restarts": float(restarts),
        }

    def shutdown(self) -> list[Any]:
        """Ask the engines to end; those that never came up are ended at once. Returns the calls to wait for."""
        for engine in self._engines.values():
            if not engine.up:
                ray.kill(engine.handle)
        return [engine.handle.shutdown.remote() for engine in self.up]

    def kill(self) -> None:
        """End what is left of them."""
        for engine in self._engines.values():
            ray.kill(engine.handle)

    def _fill(self) -> None:
        """Ask for the actors that are missing. For those that are wanted an autoscaler may have to make room."""
        for place in filter(self._may_start, range(self._wanted)):
            self._launch(place)
        spare = [place for place in range(self._wanted, self._most) if self._may_start(place)]
        if spare and time.monotonic() - self._launched_at > SETTLE_S:
            for place in spare[: room(self._config, self._site)]:
                self._launch(place)

    def _may_start(self, place: int) -> bool:
        return place not in self._engines and self._tries[place] <= self._config.rollout.max_restarts

    def _launch(self, place: int) -> None:
        name = f"rollout-{place}"
        actor = ray.remote(RolloutActor).options(**rollout_options(self._config, self._site, self._group))
        handle = actor.remote(name, self._config, self._site.gpu)
        self._engines[place] = Engine(place, name, handle, handle.start.remote())
        self._starts[place] += 1
        self._tries[place] += 1
        self._launched_at = time.monotonic()

    def _check_minimum(self) -> None:
        least, limit = self._least, self._config.cluster.start_timeout_s
        possible = sum(place in self._engines or self._may_start(place) for place in range(self._most))
        why = f"; the last that was lost was {self._reason}" if self._reason else ""
        if possible < least:
            raise RunError(
                f"only {possible} rollout actors can be kept (rollout.min_actors: {least}){why}; "
                "`train --debug` shows their logs"
            )
        if self.enough:
            self._short_since = None
            return
        self._short_since = self._short_since or time.monotonic()
        if time.monotonic() - self._short_since > limit:
            raise RunError(
                f"only {len(self.up)} rollout actors (rollout.min_actors: {least}) "
                f"for {limit:g} s (cluster.start_timeout_s){why}; "
                "allowed: machines that take so many, fewer, or more time; --resume goes on from the newest checkpoint"
            )


def one_line(error: BaseException) -> str:
    """The kind and the first line of an error, or of the one inside of a Ray task that failed with it."""
    cause = getattr(error, "cause", None) or error
    text = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
