"""Held-out prompts at the engines: shared out, waited for or looked at now and again, done by others after a loss."""

from __future__ import annotations

import math
import time
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.fleet import Engine, Fleet, one_line
from uniapl.config import Config
from uniapl.records import Group, Prompt


class Sampling:
    """Scored samples of held-out prompts, begun at once at the fleet's members.

    Args:
        fleet: whose members sample.
        config: of the run.
        prompts: held-out ones.
        samples: of each.
        temperature: 0: greedy.
        at_once: prompts that one engine works on at a time, beside what else it does and without a limit of time;
            0: all of its share, within `cluster.step_timeout_s`.
    """

    def __init__(
        self, fleet: Fleet, config: Config, prompts: list[Prompt], samples: int, temperature: float, at_once: int = 0
    ) -> None:
        self._fleet, self._prompts = fleet, prompts
        self._how = (samples, temperature, at_once)
        self._limit_s = math.inf if at_once else config.cluster.step_timeout_s
        self._made: dict[int, Group] = {}
        self._calls: dict[Any, tuple[Engine, list[int], float]] = {}
        self._share_out()

    @property
    def groups(self) -> list[Group]:
        """In the order of the prompts, once `poll` has said that all are there."""
        return [self._made[i] for i in range(len(self._prompts))]

    @property
    def stuck(self) -> bool:
        """Whether nobody is left who works on what is missing."""
        return not self._calls and len(self._made) < len(self._prompts)

    def wait(self, seconds: float) -> None:
        """Until one engine has done its share, at most so long."""
        if self._calls:
            ray.wait(list(self._calls), timeout=seconds)

    def poll(self) -> bool:
        """Take what is done, and share out what a lost engine left undone; whether everything is there.

        Raises:
            RunError: fewer engines than `rollout.min_actors` can be kept.
        """
        done = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)[0] if self._calls else []
        now = time.monotonic()
        late = [call for call, (_, _, begun) in self._calls.items() if now - begun > self._limit_s]
        for call in dict.fromkeys([*done, *late]):
            engine, share, _ = self._calls.pop(call)
            try:
                self._made |= zip(share, ray.get(call, timeout=0), strict=True)
            except RayError as error:  # GetTimeoutError among them
                self._fleet.lose(engine, f"evaluation: {one_line(error)}")
        self._share_out()
        return len(self._made) == len(self._prompts)

    def _share_out(self) -> None:
        """Ask the members for all that is neither made nor asked for."""
        asked = {i for _, share, _ in self._calls.values() for i in share}
        missing = [i for i in range(len(self._prompts)) if i not in self._made and i not in asked]
        members = self._fleet.members
        for place, engine in enumerate(members):
            if share := missing[place :: len(members)]:
                call = engine.handle.evaluate.remote([self._prompts[i] for i in share], *self._how)
                self._calls[call] = (engine, share, time.monotonic())
