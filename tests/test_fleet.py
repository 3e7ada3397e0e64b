"""Rollout actors that come and go: the bookkeeping. `chaos/test_faults_short.py` has a whole run with real ones.

It is tested on actors without an engine, and with Ray's resources sized for them, because a real one takes half a
minute to start; the queue that is told of losses is the real one.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers_lifeline
import helpers_mixing
import psutil
import pytest
import ray
from helpers_mixing import Counting, prompt

from actors.queue import start_queue
from cluster import fleet as fleet_module
from cluster import placement
from cluster.fleet import LASTED, SETTLE_S, Fleet, one_line
from cluster.placement import Site
from cluster.system import System
from uniapl.config import Config
from uniapl.records import Group, Prompt
from uniapl.runlog import RunError

for module in (helpers_mixing, sys.modules[__name__]):  # tests/ is not on the path of Ray's workers
    ray.cloudpickle.register_pickle_by_value(module)


CPUS = 4
"""Of one simulated actor, so that few of them fill the cluster."""


class Simulated:
    """A rollout actor without an engine; its `start()` fails while the file `model.path` exists."""

    def __init__(self, name: str, config: Config, gpu: bool) -> None:
        self.name, self.broken = name, Path(config.model.path)

    async def start(self) -> float:
        if self.broken.exists():
            raise MemoryError("no room for the engine\nmore of the traceback")
        return 0.0

    async def attach(self, queue: Any, reward: Any) -> None:
        self.queue = queue

    async def run(self) -> int:
        await self.queue.lease.remote(self.name, 1, 60.0)
        await asyncio.sleep(600)
        return 0

    async def die(self) -> None:
        os._exit(1)

    async def evaluate(self, prompts: list[Prompt], samples: int, temperature: float, at_once: int) -> list[Group]:
        if self.name == "rollout-1":
            os._exit(1)
        return [Group(-1, prompt, [], self.name) for prompt in prompts]

    async def shutdown(self) -> None:
        pass


@pytest.fixture
def make_fleet(
    ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Fleet, list[str]]]]:
    """Started fleets, with the lines that they told the user."""
    monkeypatch.setattr(fleet_module, "RolloutActor", Simulated)
    monkeypatch.setattr(
        fleet_module, "rollout_options", lambda config, site, group: {"num_cpus": CPUS, "max_concurrency": 8}
    )
    monkeypatch.setattr(placement, "ENGINE_CPUS", CPUS)
    before = free_cpus()
    made: list[tuple[Fleet, Any]] = []

    def make(start_timeout_s: float = 60.0, **rollout: Any) -> tuple[Fleet, list[str]]:
        config = Config.model_validate(
            {
                "model": {"path": str(tmp_path / "broken")},
                "data": {"train": ["unused"]},
                "rollout": rollout,
                "queue": {"groups_per_step": 4, "demonstrations_per_step": 1},
                "evaluation": {"prompts": 0},
                "cluster": {"start_timeout_s": start_timeout_s},
            }
        )
        queue, notes = start_queue(config, Counting(prompt), Counting(helpers_mixing.demonstration)), []
        fleet = Fleet(config, Site(), queue, notes.append)
        made.append((fleet, queue))
        fleet.start()
        return fleet, notes

    yield make
    for fleet, queue in made:
        fleet.kill()
        ray.kill(queue)
    deadline = time.monotonic() + 20
    while free_cpus() < before and time.monotonic() < deadline:
        time.sleep(0.1)


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0.0)


def until(fleet: Fleet, there: Callable[[], bool], seconds: float = 180.0) -> None:
    """Poll the fleet until `there()`; `seconds` is for a machine with other work, where a process starts slowly."""
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "not reached in time"
        fleet.wait([], 0.1)
        fleet.poll()


def kill(fleet: Fleet, place: int) -> None:
    next(e for e in fleet.up if e.place == place).handle.die.remote()


class TestFleet:
    def test_a_lost_member_is_started_again_and_its_leases_go_to_others(self, make_fleet: Any) -> None:
        fleet, notes = make_fleet(actors=2)
        until(fleet, lambda: fleet.enough)
        assert (len(fleet.up), fleet.members) == (2, [])
        fleet.admit("reward")
        fleet.begin()
        queue = fleet._queue
        until(fleet, lambda: ray.get(queue.stats.remote())["open"] == 2)
        kill(fleet, 1)
        until(fleet, lambda: bool(notes))
        assert notes[0].startswith("lost rollout-1: ActorDiedError: ")
        assert notes[0].endswith("; its 1 open leases go to others; it is started again (up to 3 times)")
        assert [e.name for e in fleet.members] == ["rollout-0"]
        until(fleet, lambda: len(fleet.up) == 2)
        assert fleet.metrics() == {"fleet/members": 1.0, "fleet/lost": 1.0, "fleet/restarts": 1.0}
        fleet.admit()
        until(fleet, lambda: ray.get(queue.stats.remote())["open"] == 2)
        for _ in range(LASTED):
            fleet.admit()
        kill(fleet, 1)
        until(fleet, lambda: len(notes) == 2)
        assert notes[1].endswith("it is started again (up to 3 times)"), "one that lasted uses none of them up"
        assert fleet.metrics()["fleet/restarts"] == 2.0

    def test_prompts_of_an_engine_that_is_lost_in_evaluation_are_done_by_the_others(self, make_fleet: Any) -> None:
        fleet, notes = make_fleet(actors=3)
        until(fleet, lambda: fleet.enough)
        fleet.admit("reward")
        prompts = [prompt(str(i)) for i in range(8)]
        system = SimpleNamespace(config=fleet._config, fleet=fleet, _look_at_rewards=lambda: None)  # without any
        groups = System.evaluate(system, prompts, 1, 0.0)
        assert [group.prompt.id for group in groups] == [p.id for p in prompts]
        assert {group.actor for group in groups} == {"rollout-0", "rollout-2"}
        assert len(notes) == 1
        assert notes[0].startswith("lost rollout-1: evaluation: ")

    def test_restarts_are_bounded_and_the_end_is_one_line(self, make_fleet: Any, tmp_path: Path) -> None:
        fleet, notes = make_fleet(actors=2, min_actors=1, max_restarts=1)
        until(fleet, lambda: len(fleet.up) == 2)
        (tmp_path / "broken").touch()
        kill(fleet, 0)
        kill(fleet, 1)
        fleet.admit("reward")  # finds out that both are gone
        with pytest.raises(
            RunError,
            match=r"^only 0 rollout actors can be kept \(rollout.min_actors: 1\); the last that was lost was "
            r"rollout-[01]: MemoryError: no room for the engine; `train --debug` shows their logs$",
        ):
            until(fleet, lambda: False)
        assert len(notes) == 4
        assert sum("not started again" in note for note in notes) == 2
        assert fleet.metrics()["fleet/lost"] == 4.0
        assert fleet.metrics()["fleet/restarts"] == 2.0

    def test_an_engine_that_cannot_start_at_all_ends_the_run_with_its_error(
        self, make_fleet: Any, tmp_path: Path
    ) -> None:
        (tmp_path / "broken").touch()
        fleet, _ = make_fleet(actors=1)
        with pytest.raises(MemoryError):
            until(fleet, lambda: False)

    def test_the_minimum_is_waited_for_as_long_as_a_start_may_take(self, make_fleet: Any) -> None:
        room = int(free_cpus() // CPUS)
        fleet, _ = make_fleet(start_timeout_s=3.0, actors=room + 1)
        with pytest.raises(RunError, match=rf"^only \d+ rollout actors \(rollout.min_actors: {room + 1}\) for 3 s"):
            until(fleet, lambda: False)

    def test_spare_places_are_filled_while_there_is_room(self, make_fleet: Any) -> None:
        room = int(free_cpus() // CPUS)
        assert room >= 2
        fleet, notes = make_fleet(actors=1, max_actors=room + 2)
        until(fleet, lambda: len(fleet.up) == room)
        time.sleep(SETTLE_S + 0.5)
        fleet.poll()
        assert len(fleet._engines) == room, "no place is asked for without room"
        assert notes == []


def test_errors_are_told_in_one_line() -> None:
    assert one_line(ValueError("\n first line \nsecond")) == "ValueError: first line"
    assert one_line(TimeoutError()) == "TimeoutError"


@pytest.mark.parametrize(
    "starts", [helpers_lifeline.actor, helpers_lifeline.actor_whose_engine_has_the_main_module], ids=["asks", "main"]
)
def test_an_engine_process_ends_with_the_killed_process_that_started_it(starts: Any) -> None:
    spawn = multiprocessing.get_context("spawn")
    pids = spawn.Queue()
    actor = spawn.Process(target=starts, args=(pids,))
    actor.start()
    engine = psutil.Process(pids.get(timeout=60))
    os.kill(actor.pid, signal.SIGKILL)
    actor.join(10)
    engine.wait(10)  # raises TimeoutExpired where it lives on
