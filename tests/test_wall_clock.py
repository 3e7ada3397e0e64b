"""What is told of a wall clock that was set back, and of reward replicas that Serve then does not miss; with real ones,
`chaos/test_faults_short.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster import wall_clock
from cluster.wall_clock import GONE_S, LOOK_S, RewardWatch, WallClock

REPLICA = "ServeReplica:uniapl-reward-01000000:"


class World:
    """What the watches see and do: Ray's list of actors and both clocks are given, since it is about time."""

    def __init__(self) -> None:
        self.now, self.wall = 1000.0, 0.0
        self.states: list[str] = []
        self.asked = 0
        self.done: list[str] = []
        self.notes: list[str] = []
        self.watch: RewardWatch

    def actors(self) -> dict[str, dict[str, Any]]:
        self.asked += 1
        name = f"{REPLICA}reward"
        found = [
            *((name, state) for state in self.states),
            ("RolloutActor", "ALIVE"),
            ("ServeReplica:uniapl-reward-02000000:reward", "ALIVE"),
        ]
        return {str(number): {"ActorClassName": kind, "State": state} for number, (kind, state) in enumerate(found)}

    def look_for(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            self.watch.look()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World()
    monkeypatch.setattr(wall_clock, "actors", made.actors)
    monkeypatch.setattr(wall_clock, "replica_class", lambda: REPLICA)  # there is no Ray here whose job has a number
    monkeypatch.setattr(wall_clock.time, "monotonic", lambda: made.now)
    monkeypatch.setattr(wall_clock.time, "time", lambda: 1.8e9 + made.now + made.wall)
    monkeypatch.setattr(wall_clock, "restart_controller", lambda: made.done.append("restart"))
    made.watch = RewardWatch(2, made.notes.append, lambda: made.done.append("renew"))
    yield made


@pytest.mark.parametrize("states", [["ALIVE"] * 2, ["DEAD", "ALIVE", "PENDING_CREATION"], ["ALIVE"] * 3])
def test_replicas_that_run_or_are_being_started_are_there(world: World, states: list[str]) -> None:
    world.states = states
    world.look_for(3 * GONE_S)
    assert (world.done, world.notes) == ([], [])


def test_serve_has_time_to_notice_by_itself(world: World) -> None:
    world.states = ["DEAD", "ALIVE"]
    world.look_for(GONE_S - LOOK_S)
    world.states = ["DEAD", "ALIVE", "ALIVE"]
    world.look_for(GONE_S)
    assert world.done == []


def test_one_that_stays_away_has_the_controller_started_anew_and_is_called_by_new_handles_once_it_is_there(
    world: World,
) -> None:
    world.states = ["DEAD", "ALIVE"]
    world.look_for(GONE_S + 3 * LOOK_S)
    assert world.done == ["restart"]
    assert world.notes == ["Ray Serve has missed for 15 s that a reward replica died: its controller starts anew"]
    world.states = ["DEAD", "ALIVE", "ALIVE"]
    world.look_for(2 * GONE_S)
    assert world.done == ["restart", "renew"]


def test_as_long_as_it_stays_away_that_is_done_once_in_a_while(world: World) -> None:
    world.states = ["DEAD", "ALIVE"]
    world.look_for(2 * (GONE_S + 3 * LOOK_S))
    assert world.done == ["restart", "restart"]


def test_time_in_which_nobody_looked_does_not_count(world: World) -> None:
    world.states = ["ALIVE"] * 2
    world.look_for(2 * LOOK_S)
    world.now += 100.0
    world.states = ["DEAD", "ALIVE"]
    world.look_for(GONE_S)


def test_ray_is_not_asked_at_every_look(world: World) -> None:
    world.states = ["ALIVE"] * 2
    world.look_for(20.0)
    assert 8 <= world.asked <= 20.0 / LOOK_S


def test_a_clock_that_was_set_back_is_told_once_and_none_that_is_slewed_or_set_ahead(world: World) -> None:
    notes: list[str] = []
    clock = WallClock(notes.append)
    for wall in (0.0, -5.0, -9.0, 3600.0, 0.0, 0.0):
        world.now += 60.0
        world.wall = wall
        clock.look()
    assert [note.partition(":")[0] for note in notes] == ["the wall clock was set back by 3600 s"]
