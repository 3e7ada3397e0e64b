"""Two hundred steps with a random fault every few seconds: `make chaos`.

Faults come from a shuffled deck, so that each kind is made before one is made again. The run's folder is on a file
system of its own, so that its disk can be full, mounted for this process and those that it starts; where it may not
mount one there is no such fault. `CHAOS_STEPS` sets another number of steps, `CHAOS_SEED` another sequence of faults.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers_faults import ACTOR, ENGINE, GROUPS, QUEUE, RANK, REPLICA, STALENESS, STEP, World, world

from uniapl.runlog import read_metrics

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]
STEPS = int(os.environ.get("CHAOS_STEPS", "200"))
SEED = int(os.environ.get("CHAOS_SEED", "7"))
PAUSE_S = (1.0, 4.0)
"""Between two faults."""
LEAST = STEPS // 13
"""Faults in that many steps."""
FATAL_EVERY = max(10, STEPS // 5)
"""Steps: at most one fault that ends the system in so many, since every new life starts engines for a minute."""
GONE_S = 120.0
"""Within which nothing may be left of a life that ended."""
LOSSES = 100
"""Of one rollout actor, and of the whole system: more than the faults that are made, which the test holds it to."""

ENGINES, IN_FLIGHT = 2, 4
"""Rollout actors, and the leases that each of them holds at most (`rollout.groups_in_flight`)."""
ADMITTED = (STALENESS + 1) * GROUPS
"""Groups that are leased or ready at a time, at most."""

CLONE_NEWNS = 0x00020000  # linux/sched.h
DISK_MIB = 256


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path | None]:
    """The folder of the run's folder as a file system of its own; None: this user may not mount one."""
    folder = tmp_path / "runs"
    folder.mkdir()
    if ctypes.CDLL(None).unshare(CLONE_NEWNS) != 0:
        yield None
        return
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def place(tmp_path: Path, disk: Path | None) -> Iterator[World]:
    """A head with room for two learner ranks and one engine, and a node for the other one."""
    with world(tmp_path, 3) as made:
        yield made


def faults(place: World, draw: random.Random) -> dict[str, Callable[[], bool | None]]:
    """Those that a run survives; False: not made.

    Engines are taken one at a time: a run without any makes no steps.
    """
    taken_at, nodes = [0], [place.cluster.add_node(num_cpus=1)]

    def both() -> bool:
        step = place.last("step ")
        if free := step > taken_at[0] and len(place.processes(ENGINE)) == 2 and place.last("engines ") == 2:
            taken_at[0] = step
        return free

    def engine(word: str, number: int) -> bool:
        if free := both():
            place.signal(word, number, draw.randrange(2))
        return free

    def node() -> bool:
        if free := both():
            place.cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.append(place.cluster.add_node(num_cpus=1))
        return free

    def redis() -> None:
        place.redis.kill()
        time.sleep(1)
        place.redis.start()

    ahead = [0.0]

    def clock() -> None:
        """Ahead by up to two hours, or back by seconds: by more Ray's timers would stand still for too long."""
        ahead[0] += draw.choice([draw.uniform(0, 7200), -draw.uniform(0, 5)])
        place.jump(ahead[0])

    def reward(word: str) -> None:
        place.say(word)
        time.sleep(draw.uniform(1, 4))
        place.say("slow 0.5")

    return {
        "rollout actor killed": lambda: engine(ACTOR, signal.SIGKILL),
        "engine process killed": lambda: engine(ENGINE, signal.SIGKILL),
        "engine hung": lambda: engine(ENGINE, signal.SIGSTOP),
        "node removed": node,
        "reward replica killed": lambda: place.signal(REPLICA),
        "reward wrong": lambda: reward("wrong"),
        "reward hangs": lambda: reward("hang"),
        "Redis killed and restarted": redis,
        "object store full": place.fill_object_store,
        "clock jumps": clock,
    }


PARTS = (RANK, ACTOR, ENGINE, QUEUE, REPLICA, "ray::ServeController")
OF_THE_SYSTEM = {"queue actor killed": QUEUE, "learner rank killed": RANK}
OF_THE_DRIVER = ("driver killed", "disk full")


def end(place: World, name: str) -> None:
    """A fault that ends this life, and the next one: of the system by itself, of the driver by `--resume`."""
    assert place.process is not None
    if name in OF_THE_SYSTEM:
        since = len(place.lines)
        place.signal(OF_THE_SYSTEM[name])
        place.until("the run starts again", since)
        place.until(STEP, len(place.lines))
        return
    if name == "disk full":
        run_out_of_room(place)
    else:
        place.process.kill()
        place.ends.append(place.ended())
    deadline = time.monotonic() + GONE_S
    while any(map(place.processes, PARTS)):  # after a SIGKILL the cluster ends them, and Serve itself
        assert time.monotonic() < deadline, "a life's processes outlive it"
        time.sleep(0.2)
    place.begin("--resume")


def run_out_of_room(place: World) -> None:
    """Another program takes what is free on the run's disk until the run has ended for it, in one line."""
    other = place.run.parent / "other"
    with other.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 20)):
            pass
    place.ends.append(place.ended())
    other.unlink()
    status, line = place.ends[-1]
    assert (status, line.startswith(("checkpoint of step ", "no space left on the disk: "))) == (2, True), line
    assert "--resume goes on from step-" in line


def disturb(place: World, draw: random.Random, disk: Path | None) -> Counter[str]:
    """A random fault every few seconds until the run has come to its end; how often each was made."""
    survived, fatal_at = faults(place, draw), draw.randrange(FATAL_EVERY // 2, FATAL_EVERY)
    ending = [*OF_THE_SYSTEM, *OF_THE_DRIVER[: None if disk else 1]]
    made = Counter(dict.fromkeys([*survived, *ending], 0))
    decks: dict[bool, list[str]] = {True: [], False: []}
    while place.process and place.process.poll() is None:
        time.sleep(draw.uniform(*PAUSE_S))
        step = place.last("step ")
        if place.process.poll() is not None or not place.training or step > STEPS - 5:
            continue
        fatal = step >= fatal_at
        if not (deck := decks[fatal]):
            deck += sorted(ending if fatal else survived)
            draw.shuffle(deck)
        name = deck.pop()
        if fatal:
            fatal_at += FATAL_EVERY
            end(place, name)
        elif survived[name]() is False:  # no second engine at the moment: later
            deck.insert(0, name)
            continue
        made[name] += 1
        print(f"step {step}: {name}", flush=True)
    return made


def test_a_run_under_random_faults_keeps_its_books(place: World, disk: Path | None, tiny: Path) -> None:
    place.configure(
        tiny,
        run={"steps": STEPS, "checkpoint_every": 5, "max_restarts": LOSSES},
        rollout={"actors": ENGINES, "groups_in_flight": IN_FLIGHT, "max_restarts": LOSSES},
        reward={"timeout_s": 5.0},
        cluster={"broadcast_timeout_s": 20.0},
    )
    place.say("slow 0.5")  # a step takes a second, so that a lost engine is back before the next one is lost
    began = time.monotonic()
    place.begin()
    made = disturb(place, random.Random(SEED), disk)
    place.ends.append(place.ended())
    print(f"{time.monotonic() - began:.0f} s, {made.total()} faults, {len(place.ends)} lives: {dict(made)}", flush=True)
    place.see_what_is_left()
    assert place.ends[-1][0] == 0, place.output[-4000:]
    assert "Traceback" not in place.output
    metrics = read_metrics(place.run)
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    state = place.assert_ledger_balances(STEPS)
    print(
        json.dumps({"leases": state["lease_counts"], "groups": state["counts"], "misdeeds": place.misdeeds()}),
        flush=True,
    )
    place.assert_every_group_was_consumed_once(STEPS)
    place.assert_no_demonstration_was_skipped_or_repeated(STEPS)
    place.assert_engines_hold_the_learners_weights()
    assert_every_kind_was_made(made)
    assert_nothing_was_retried_without_a_fault(place, made, state)
    assert place.left == []


def assert_every_kind_was_made(made: Counter[str]) -> None:
    assert made.total() >= LEAST, made
    if STEPS >= 200:
        assert min(made.values()) > 0, made


def assert_nothing_was_retried_without_a_fault(place: World, made: Counter[str], state: dict[str, Any]) -> None:
    """Engines and the system were started again as often as something ended them, and no group was made in vain but by
    a cause: its engine was lost or its life ended, a call of its reward went wrong, or a fault held it up."""
    lost = place.output.count("lost rollout-")
    engines = sum(made[name] for name in ("rollout actor killed", "engine process killed", "engine hung"))
    # A replacement may be put on the node that is about to be known as gone.
    assert lost <= engines + 2 * made["node removed"], "nothing else may cost an engine"
    ended = sum(made[name] for name in (*OF_THE_SYSTEM, *OF_THE_DRIVER))
    assert place.output.count("the run starts again") == made["queue actor killed"] + made["learner rank killed"]
    counts, leases = Counter(state["counts"]), Counter(state["lease_counts"])
    assert leases["expired"] == 0
    assert leases["released"] <= IN_FLIGHT * (lost + ENGINES * (ended + 1)), "by lost engines, ended lives and the end"
    assert counts["regenerated"] + counts["dropped_unscored"] <= place.misdeeds().total(), "a call for each, at least"
    held_up = lost + ended + sum(made[name] for name in ("reward replica killed", "reward wrong", "reward hangs"))
    assert counts["dropped_stale"] <= ADMITTED * held_up, "what was leased or ready at the time"
    assert counts["resampled"] == 0
    assert len(state["ready"]) <= ADMITTED
