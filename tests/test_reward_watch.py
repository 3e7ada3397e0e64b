"""Reward replicas that are gone and that Serve does not miss; with a real one, `chaos/test_faults_short.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster import reward_watch
from cluster.reward_watch import GONE_S, LOOK_S, RewardWatch

REPLICA = "ServeReplica:uniapl-reward-01000000:"


class World:
    """What the watch sees and does: Ray's list of actors and the clock are given, since it is about time, a restart is
    counted.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.states: list[str] = []
        self.asked = self.restarts = 0
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

    def restart(self) -> None:
        self.restarts += 1

    def look_for(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            self.watch.look()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World()
    monkeypatch.setattr(reward_watch, "actors", made.actors)
    monkeypatch.setattr(reward_watch, "replica_class", lambda: REPLICA)  # there is no Ray here whose job has a number
    monkeypatch.setattr(reward_watch, "restart_controller", made.restart)
    monkeypatch.setattr(reward_watch.time, "monotonic", lambda: made.now)
    made.watch = RewardWatch(2, made.notes.append)
    yield made


@pytest.mark.parametrize("states", [["ALIVE"] * 2, ["DEAD", "ALIVE", "PENDING_CREATION"], ["ALIVE"] * 3])
def test_replicas_that_run_or_are_being_started_are_there(world: World, states: list[str]) -> None:
    world.states = states
    world.look_for(3 * GONE_S)
    assert (world.restarts, world.notes) == (0, [])


def test_serve_has_time_to_notice_by_itself(world: World) -> None:
    world.states = ["DEAD", "ALIVE"]
    world.look_for(GONE_S - LOOK_S)
    world.states = ["DEAD", "ALIVE", "ALIVE"]
    world.look_for(GONE_S)
    assert world.restarts == 0


def test_one_that_stays_away_has_the_controller_started_anew_once_in_a_while(world: World) -> None:
    world.states = ["DEAD", "ALIVE"]
    world.look_for(GONE_S + 3 * LOOK_S)
    assert world.restarts == 1
    assert world.notes == ["Ray Serve has missed for 15 s that a reward replica died: its controller starts anew"]
    world.look_for(GONE_S + 3 * LOOK_S)
    assert world.restarts == 2


def test_time_in_which_nobody_looked_does_not_count(world: World) -> None:
    world.states = ["ALIVE"] * 2
    world.look_for(2 * LOOK_S)
    world.now += 100.0
    world.states = ["DEAD", "ALIVE"]
    world.look_for(GONE_S)
    assert world.restarts == 0


def test_ray_is_not_asked_at_every_look(world: World) -> None:
    world.states = ["ALIVE"] * 2
    world.look_for(20.0)
    assert 8 <= world.asked <= 20.0 / LOOK_S
