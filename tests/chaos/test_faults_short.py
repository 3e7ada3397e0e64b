"""The fault table in one run of two rollout actors and two ranks that goes on by itself to its last step.

The form of `test_faults.py` in `make test`: the same faults, but closer together, and the system starts again twice,
after the queue's death and after a rank's. Each of these starts also brings back the engines that were lost before.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from helpers_faults import ACTOR, ENGINE, QUEUE, RANK, REPLICA, STEP, World

from uniapl.runlog import read_metrics

STEPS = 60
"""Three times as many as pass before the last fault, while rewards are slow; they are not for the rest."""
REWARD_S, BROADCAST_S = 2.5, 8.0
HOUR = 3600.0
ANEW = "its controller starts anew"
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def lived(place: World, tiny: Path) -> World:
    place.configure(
        tiny,
        run={"steps": STEPS, "checkpoint_every": 2, "max_restarts": 2},
        rollout={"actors": 1, "max_actors": 2},
        reward={"timeout_s": REWARD_S},
        cluster={"broadcast_timeout_s": BROADCAST_S},
    )
    place.say("slow")
    place.begin()
    node = while_it_grows(place)
    until_the_queue_dies(place)
    until_a_rank_dies(place, node)
    place.until("engines 2", len(place.lines))
    place.fault("engine process killed", lambda: place.signal(ENGINE), "lost rollout-")
    place.say("slow 0.5")
    the_clock_is_set_back(place)
    place.say("")
    place.ends.append(place.ended())
    print(json.dumps({name: round(seconds, 1) for name, seconds in place.interrupted.items()}))
    place.see_what_is_left()
    return place


def while_it_grows(place: World) -> Any:
    """A node joins in mid-run, and while its engine starts come those faults that cost no engine; the node."""
    place.until(STEP, 0)
    place.say("slow 0.5")
    one_engine, node = len(place.lines), place.cluster.add_node(num_cpus=1)
    place.fault("clock an hour ahead", lambda: place.jump(HOUR), STEP)
    place.fault("reward raises, NaN, a string", lambda: place.misbehave("wrong", 12), STEP)
    place.fault("reward hangs", lambda: place.misbehave("hang", 2, REWARD_S), STEP)
    place.fault("reward replica killed", lambda: kill_replica(place), STEP)
    place.fault("Redis killed and restarted", place.restart_redis, STEP)
    place.fault("object store full", place.fill_object_store, STEP)
    place.say("slow")
    place.until("engines 2", one_engine)
    return node


def kill_replica(place: World) -> None:
    """And wait for the one that Serve starts in its place."""
    place.signal(REPLICA)
    while not place.processes(REPLICA):
        time.sleep(0.1)


def the_clock_is_set_back(place: World) -> None:
    """Last, since Ray's timers then stand still for two hours: it would know of no node and no room that is new."""
    place.fault("clock an hour back", lambda: place.jump(-HOUR), "the wall clock was set back by 7200 s")
    assert ANEW not in place.output, "Serve replaces a replica by itself, as long as its clock is right"
    place.fault("reward replica killed, clock back", lambda: place.signal(REPLICA), ANEW)


def until_the_queue_dies(place: World) -> None:
    """Both engines go, and with them the queue: nobody is left who has a lease, nor who knows of one."""
    place.fault("engine hung", lambda: place.signal(ENGINE, signal.SIGSTOP), "lost rollout-0")
    since = len(place.lines)
    place.signal(ACTOR)
    place.until("lost rollout-1", since)
    place.fault("queue actor killed", lambda: place.signal(QUEUE), "the queue actor died; the run starts again")


def until_a_rank_dies(place: World, node: Any) -> None:
    """The node leaves, and another one joins for the system's last life."""
    place.until("engines 2", len(place.lines))
    place.fault("node removed", lambda: place.cluster.remove_node(node, allow_graceful=False), "lost rollout-")
    place.cluster.add_node(num_cpus=1)
    place.fault("learner rank killed", lambda: place.signal(RANK), r"learner rank \d died; the run starts again")


def test_the_run_reached_its_last_step_by_itself(lived: World) -> None:
    [(status, line)] = lived.ends
    assert (status, line.startswith("report: ")) == (0, True)
    assert [m["step"] for m in read_metrics(lived.run)] == list(range(1, STEPS + 1))
    assert "Traceback" not in lived.output


def test_every_loss_was_told_and_nothing_else_cost_an_engine(lived: World) -> None:
    lost = re.findall(r"lost rollout-\d: ", lived.output)
    assert 4 <= len(lost) <= 5, "Ray may start one more on the node that is about to be known as gone"
    assert "did not" in lived.output or "gave no answer" in lived.output, "the hung one"


def test_the_system_started_again_after_the_queues_and_after_a_ranks_death(lived: World) -> None:
    assert lived.started_again == [("the queue actor", "(up to 2 times more)"), ("learner rank", "(once more)")]


def test_a_node_that_joined_was_used(lived: World) -> None:
    members = [m["fleet/members"] for m in read_metrics(lived.run)]
    assert (members[0], max(members)) == (1.0, 2.0)


def test_the_ledger_balances_and_what_could_not_be_scored_says_why(lived: World) -> None:
    state = lived.assert_ledger_balances(STEPS)
    assert state["lease_counts"].get("expired", 0) == 0
    said = " ".join(state["unscored"])
    for reason in ("RuntimeError: the judge is out", "returned nan", "returned str 'very good'", "took longer than"):
        assert reason in said
    assert state["counts"]["regenerated"] > 0


def test_every_group_was_consumed_once_and_none_is_over_stale(lived: World) -> None:
    lived.assert_every_group_was_consumed_once(STEPS)


def test_no_lease_and_no_deadline_follows_the_wall_clock(lived: World) -> None:
    seen = [m["time"] for m in read_metrics(lived.run)]
    jumps = [b - a for a, b in itertools.pairwise(seen)]
    assert max(jumps) > HOUR - 60
    assert min(jumps) < -2 * HOUR + 600


def test_nothing_is_left_of_any_life(lived: World) -> None:
    assert lived.left == []


def test_the_engines_held_the_weights_of_the_learner_at_the_end(lived: World) -> None:
    lived.assert_engines_hold_the_learners_weights()


def test_no_demonstration_was_skipped_or_repeated_in_any_life(lived: World) -> None:
    lived.assert_no_demonstration_was_skipped_or_repeated(STEPS)
