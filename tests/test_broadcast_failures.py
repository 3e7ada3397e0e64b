"""An engine that dies or stalls in any phase of a weight broadcast is cut off; the others get the weights in time."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from helpers_engines import DEATHS, LAYERS, StandInEngine, StandInRank, weights

from uniapl.broadcast_result import BroadcastError, Sent

DEADLINE_S = 3.0
PHASES = {
    "join": "join the weight group",
    "connect": "join the weight group",
    "pause": "pause for new weights",
    "receive": "receive weights",
    "load": "load the weights",
    "resume": "resume",
}
# connect: the others know that it is there, and wait for it inside of gloo.
CASES = [(phase, fault) for fault in (signal.SIGKILL, signal.SIGSTOP) for phase in PHASES]
WHOLE = LAYERS * ((64 + 1) * 1024 * 4 + 8)
"""Bytes of all layers with their checksums."""


@dataclass
class Fleet:
    """Two learner ranks, two engines that stay, and others to lose."""

    ray: Any
    ranks: list[Any]
    stay: list[Any]
    spare: list[Any] = field(default_factory=list)
    stopped: Any = None
    version: int = 0

    def victim(self, fault: signal.Signals) -> Any:
        """One that is lost for ever, or the one that is stopped and waked again."""
        return self.stopped if fault is signal.SIGSTOP else self.spare.pop()

    def connect(self, engines: list[Any]) -> tuple[Sent, float]:
        began = time.monotonic()
        sent = self.ray.get([rank.connect.remote(engines) for rank in self.ranks], timeout=60)[0]
        return sent, time.monotonic() - began

    def broadcast(self) -> tuple[Sent, float]:
        self.version += 1
        return self.ray.get([rank.broadcast.remote(self.version) for rank in self.ranks], timeout=60)[0]

    def check(self, engine: Any) -> None:
        """The engine has the present weights, every value of them, their version, and goes on."""
        version, paused, held = self.ray.get(engine.state.remote(), timeout=60)
        assert (version, paused) == (self.version, False)
        for layer in range(LAYERS):
            matrix, vector = weights(self.version, layer)
            assert held[f"{layer}.matrix"] == matrix.tolist()
            assert held[f"{layer}.vector"] == vector.tolist()


@pytest.fixture(scope="module")
def fleet(ray_session: Any) -> Iterator[Fleet]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    engine = ray_session.remote(StandInEngine).options(num_cpus=0)
    rank = ray_session.remote(StandInRank).options(num_cpus=0, runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu"}})
    engines = [engine.remote(f"engine-{i}") for i in range(10)]
    ranks = [rank.remote(i, 2, rendezvous, DEADLINE_S) for i in range(2)]
    made = Fleet(ray_session, ranks, engines[:2], engines[3:], engines[2])
    ray_session.get([e.pid.remote() for e in engines] + [r.threads.remote() for r in ranks], timeout=300)
    yield made
    for actor in [*engines, *ranks]:
        ray_session.kill(actor)


@pytest.mark.parametrize(("phase", "fault"), CASES, ids=lambda value: getattr(value, "name", value))
def test_the_others_get_the_weights_and_the_lost_one_is_named(fleet: Fleet, phase: str, fault: signal.Signals) -> None:
    victim = fleet.victim(fault)
    pid = fleet.ray.get(victim.pid.remote())
    engines = [fleet.stay[0], victim, fleet.stay[1]]
    try:
        if phase in ("join", "connect"):
            fleet.ray.get(victim.arm.remote(phase, fault))
            lost, seconds = fleet.connect(engines)
            sent, _ = fleet.broadcast()
            assert lost.lost == sent.lost, "places are among the handles last given to connect"
        else:
            fleet.connect(engines)
            fleet.ray.get(victim.arm.remote(phase, fault))
            sent, seconds = fleet.broadcast()
        assert list(sent.lost) == [1]
        assert PHASES[phase] in sent.lost[1] and DEATHS[fault] in sent.lost[1]
        assert seconds < 2 * DEADLINE_S
        assert sent.metrics["broadcast/attempts"] == (2 if phase in ("pause", "receive") else 1)
        again = sent.metrics["broadcast/bytes"] - WHOLE
        assert 0 < again <= WHOLE if phase == "receive" else again == 0, "those of attempts that failed count"
        for engine in fleet.stay:
            fleet.check(engine)
        again, _ = fleet.broadcast()
        assert again.lost == sent.lost
        for engine in fleet.stay:
            fleet.check(engine)
    finally:
        if fault is signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
    assert fleet.ray.get(fleet.ranks[0].threads.remote()) == 0, "no thread is left that waits"


def test_one_that_was_lost_joins_again_and_gets_the_present_weights(fleet: Fleet) -> None:
    sent, _ = fleet.connect([*fleet.stay, fleet.stopped])
    assert sent.lost == {}
    sent, _ = fleet.broadcast()
    assert sent.lost == {}
    assert sent.metrics["broadcast/bytes"] == WHOLE
    for phase in ("join", "pause", "gather", "send", "load", "resume"):
        assert 0 < sent.metrics[f"broadcast/{phase}_s"] < DEADLINE_S
    for engine in [*fleet.stay, fleet.stopped]:
        fleet.check(engine)
    assert fleet.broadcast()[0].metrics["broadcast/join_s"] == 0, "no group was formed for this one"


def test_a_learner_rank_that_stalls_is_told_and_no_engine_is_cut_off_for_it(fleet: Fleet) -> None:
    fleet.connect(fleet.stay)
    pid = fleet.ray.get(fleet.ranks[1].pid.remote())
    fleet.ray.get(fleet.ranks[1].stop_in_a_gather.remote())
    waking = threading.Timer(DEADLINE_S + 1, os.kill, (pid, signal.SIGCONT))
    waking.start()
    with pytest.raises(BroadcastError, match=r"learner's ranks gathered weights for .* s of the 3 s that engines wait"):
        fleet.broadcast()
    waking.join()
    assert fleet.broadcast()[0].lost == {}
    for engine in fleet.stay:
        fleet.check(engine)


def test_other_bytes_acknowledged_cut_the_engine_off_before_it_goes_on(fleet: Fleet) -> None:
    fleet.connect([*fleet.stay, fleet.stopped])
    fleet.ray.get(fleet.stopped.acknowledge_other_bytes.remote())
    sent, _ = fleet.broadcast()
    assert list(sent.lost) == [2]
    assert "acknowledged version" in sent.lost[2] and "with checksum other; sent was version" in sent.lost[2]
    assert fleet.ray.get(fleet.stopped.state.remote())[1], "it stays paused"
    for engine in fleet.stay:
        fleet.check(engine)


def test_when_all_are_lost_the_learner_goes_on(fleet: Fleet) -> None:
    engines = [fleet.stopped, fleet.spare.pop()]
    fleet.connect(engines)
    fleet.ray.get([fleet.stopped.acknowledge_other_bytes.remote(), engines[1].arm.remote("receive", signal.SIGKILL)])
    sent, _ = fleet.broadcast()
    assert sorted(sent.lost) == [0, 1]
    assert fleet.broadcast()[0].lost == sent.lost
    assert fleet.connect(fleet.stay)[0].lost == {}
    assert fleet.broadcast()[0].lost == {}
    for engine in fleet.stay:
        fleet.check(engine)
