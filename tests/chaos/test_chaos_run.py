"""Two hundred steps with a random fault every few seconds: `make chaos`.

`CHAOS_STEPS` sets another number of steps, `CHAOS_SEED` another sequence of faults.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers_cli import shared_memory
from helpers_faults import ACTOR, ENGINE, QUEUE, RANK, REPLICA, STEP, World, world
from helpers_redis import Server, free_port
from helpers_toy import toy_config

from uniapl.runlog import read_metrics

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]
STEPS = int(os.environ.get("CHAOS_STEPS", "200"))
SEED = int(os.environ.get("CHAOS_SEED", "7"))
GROUPS, SAMPLES = 4, 4
PAUSE_S = (2.0, 8.0)
"""Between two faults."""
FATAL_EVERY = max(10, STEPS // 4)
"""Steps: at most one fault that ends the system in so many, since every new life starts engines for a minute."""
GONE_S = 120.0
"""Within which nothing may be left of a life that ended."""
LOSSES = 100
"""Of one rollout actor, and of the whole system: more than there can be."""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        made = world(tmp_path, 4, patch, Server(free_port(), tmp_path))
        yield made
        if made.process:
            made.process.kill()
        made.cluster.shutdown()
        made.redis.kill()


def faults(place: World, draw: random.Random) -> dict[str, Callable[[], bool | None]]:
    """Those that a run survives; False: not made.

    Engines are taken one at a time: a run without any makes no steps.
    """
    taken_at = [0]

    def engine(word: str, number: int) -> bool:
        step = place.last("step ")
        both = step > taken_at[0] and len(place.processes(ENGINE)) == 2 and place.last("engines ") == 2
        if both:
            place.signal(word, number, draw.randrange(2))
            taken_at[0] = step
        return both

    def redis() -> None:
        place.redis.kill()
        time.sleep(1)
        place.redis.start()

    def reward(word: str) -> None:
        place.say(word)
        time.sleep(draw.uniform(1, 4))
        place.say("")

    return {
        "rollout actor killed": lambda: engine(ACTOR, signal.SIGKILL),
        "engine process killed": lambda: engine(ENGINE, signal.SIGKILL),
        "engine hung": lambda: engine(ENGINE, signal.SIGSTOP),
        "reward replica killed": lambda: place.signal(REPLICA),
        "reward wrong": lambda: reward("wrong"),
        "reward hangs": lambda: reward("hang"),
        "Redis killed and restarted": redis,
        "object store full": place.fill_object_store,
        "clock jumps": lambda: place.jump(draw.uniform(-7200, 7200)),
    }


FATAL = {"queue actor killed": QUEUE, "learner rank killed": RANK, "driver killed": ""}


def end(place: World, name: str) -> None:
    """A fault that ends this life, and the next one: of the system by itself, of the driver by `--resume`."""
    assert place.process is not None
    if name != "driver killed":
        since = len(place.lines)
        place.signal(FATAL[name])
        place.until("the run starts again", since)
        place.until(STEP, len(place.lines))
        return
    place.process.kill()
    place.ends.append(place.ended())
    deadline = time.monotonic() + GONE_S
    while place.processes(RANK) or place.processes(ENGINE):  # after a SIGKILL the cluster ends them
        assert time.monotonic() < deadline, "a life's processes outlive it"
        time.sleep(0.2)
    place.begin("--resume")


def disturb(place: World, draw: random.Random) -> Counter[str]:
    """A random fault every few seconds until the run has come to its end; how often each was made."""
    made: Counter[str] = Counter()
    survived, fatal_at = faults(place, draw), draw.randrange(FATAL_EVERY // 2, FATAL_EVERY)
    while place.process and place.process.poll() is None:
        time.sleep(draw.uniform(*PAUSE_S))
        step = place.last("step ")
        if place.process.poll() is not None or not place.training or step > STEPS - 5:
            continue
        if step >= fatal_at:
            name = draw.choice(sorted(FATAL))
            fatal_at += FATAL_EVERY
            end(place, name)
        else:
            name = draw.choice(sorted(survived))
            if survived[name]() is False:
                continue
        made[name] += 1
        print(f"step {step}: {name}", flush=True)
    return made


def test_a_run_under_random_faults_keeps_its_books(place: World, tiny: Path) -> None:
    place.config = toy_config(
        place.folder,
        tiny,
        run={"name": "faults", "steps": STEPS, "checkpoint_every": 5, "max_restarts": LOSSES},
        rollout={"actors": 2, "min_actors": 1, "groups_in_flight": 4, "max_restarts": LOSSES},
        reward={
            "functions": [{"name": "helpers_toy:many_e_faulty"}],
            "redis_url": place.redis.url,
            "timeout_s": 5.0,
        },
        queue={"groups_per_step": GROUPS, "max_staleness": 2},
        learner={"ranks": 2, "learning_rate": 1e-3},
        cluster={"address": place.cluster.address, "broadcast_timeout_s": 20.0},
    )
    place.say("")
    before, began = shared_memory(), time.monotonic()
    place.begin()
    made = disturb(place, random.Random(SEED))
    place.ends.append(place.ended())
    print(f"{time.monotonic() - began:.0f} s, {made.total()} faults, {len(place.ends)} lives: {dict(made)}", flush=True)
    assert place.ends[-1][0] == 0, place.output[-4000:]
    assert "Traceback" not in place.output
    metrics = read_metrics(place.run)
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    state = place.assert_ledger_balances(STEPS, GROUPS)
    print(json.dumps({"leases": state["lease_counts"], "groups": state["counts"]}), flush=True)
    place.assert_every_group_was_consumed_once(STEPS, GROUPS, SAMPLES)
    assert max(m["staleness/max"] for m in metrics) <= 2
    place.assert_engines_hold_the_learners_weights()
    engines = sum(made[name] for name in ("rollout actor killed", "engine process killed", "engine hung"))
    assert place.output.count("lost rollout-") <= engines, "nothing else may cost an engine"
    assert [p.name() for word in (ACTOR, ENGINE, RANK, QUEUE, REPLICA) for p in place.processes(word)] == []
    assert place.litter(before) == []
