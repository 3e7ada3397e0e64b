"""One asynchronous run of two rollout actors and two ranks, in three lives, with the faults of docs/reliability.md.

All are real: kills, signals, a node that leaves, a Redis that ends, an object store without room. Those that a run
survives come first, then two after which it starts again by itself, and, since it may do so only twice, one that ends
it with one line, after which `--resume` goes on. `test_faults_short.py` is the form of it in `make test`.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import time
from pathlib import Path

import pytest
from helpers_faults import ACTOR, ENGINE, QUEUE, RANK, REPLICA, STALENESS, STEP, World

from cluster.checkpoints import newest_checkpoint
from uniapl.runlog import read_metrics

MANY, LAST = 1000, 8
"""Steps that no life of this test reaches, and steps of the last life."""
HOUR = 3600.0
METHOD = ("-m", str(Path(__file__).resolve().parents[2] / "configs" / "methods" / "grpo.yaml"))
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3000)]  # one fixture is three lives


@pytest.fixture(scope="module")
def lived(place: World, tiny: Path) -> World:
    place.configure(
        tiny,
        run={"steps": MANY, "checkpoint_every": 4, "max_restarts": 2},
        rollout={"actors": 2},
        reward={"timeout_s": 5.0},
        cluster={"broadcast_timeout_s": 20.0},
    )
    place.say("slow")  # so that steps do not pass before an engine has started
    first_life(place)
    second_life(place)
    last_life(place)
    print(json.dumps({name: round(seconds, 1) for name, seconds in place.interrupted.items()}))
    place.see_what_is_left()
    return place


def first_life(place: World) -> None:
    place.begin(*METHOD)
    # The head is full with these three; only then is there a node for the second engine.
    while len(place.processes(RANK)) < 2 or not place.processes(ACTOR):
        assert place.process and place.process.poll() is None, place.output
        time.sleep(0.2)
    node = place.cluster.add_node(num_cpus=1)
    place.until("engines 2", 0)
    place.fault("node removed", lambda: place.cluster.remove_node(node, allow_graceful=False), "lost rollout-1")
    place.cluster.add_node(num_cpus=1)
    one_engine = len(place.lines)
    place.fault("reward raises, NaN, a string", lambda: place.misbehave("wrong", 12), STEP)
    place.fault("reward hangs", lambda: place.misbehave("hang", 4), STEP)
    place.fault("reward replica killed", lambda: place.signal(REPLICA), STEP, 2)
    place.fault("Redis killed and restarted", place.restart_redis, STEP)
    place.fault("object store full", place.fill_object_store, STEP)
    place.fault("clock an hour ahead", lambda: place.jump(HOUR), STEP)
    place.until("engines 2", one_engine)
    now = len(place.lines)
    place.fault("rollout actor killed", lambda: place.signal(ACTOR), "lost rollout-")
    place.until("engines 2", now + 1)
    place.fault("engine hung", lambda: place.signal(ENGINE, signal.SIGSTOP), "lost rollout-")


def second_life(place: World) -> None:
    """Of the system, in the same process of the driver."""
    place.fault("queue actor killed", lambda: place.signal(QUEUE), "the queue actor died; the run starts again")
    place.until("engines 2", len(place.lines))
    place.fault("engine process killed", lambda: place.signal(ENGINE), "lost rollout-")
    place.fault("learner rank killed", lambda: place.signal(RANK), r"learner rank \d died; the run starts again")
    place.signal(RANK)
    place.ends.append(place.ended())


def last_life(place: World) -> None:
    made = newest_checkpoint(place.run)
    assert made is not None
    place.steps = made[0] + LAST
    place.begin(*METHOD, "--resume", f"run.steps={place.steps}")
    place.until(STEP, place.born)
    # In the last life: Ray's timers stand still from now on, and with them what it knows of nodes and room.
    place.fault("clock an hour back", lambda: place.jump(-HOUR), STEP)
    place.switch.unlink()
    place.ends.append(place.ended())


def test_the_run_reached_its_last_step_and_every_loss_was_told(lived: World) -> None:
    metrics = read_metrics(lived.run)
    assert [m["step"] for m in metrics] == list(range(1, lived.steps + 1))
    lost = re.findall(r"lost (rollout-\d): ", lived.output)
    assert 4 <= len(lost) <= 5, "Ray may start one more on the node that is about to be known as gone"
    assert "Traceback" not in lived.output


def test_after_the_death_of_the_queue_or_a_rank_the_run_starts_again_as_often_as_it_may(lived: World) -> None:
    assert lived.started_again == [("the queue actor", "(up to 2 times more)"), ("learner rank", "(once more)")]


def test_one_more_dead_rank_then_ends_it_with_one_line_that_says_how_to_go_on(lived: World) -> None:
    rank, last = lived.ends
    assert rank[0] == 2
    assert re.fullmatch(r"learner rank [01] died; --resume goes on from step-\d{5}", rank[1])
    assert (last[0], last[1].startswith("report: ")) == (0, True)


def test_the_ledger_balances_over_all_lives(lived: World) -> None:
    state = lived.assert_ledger_balances(lived.steps)
    assert state["counts"]["regenerated"] + state["counts"].get("dropped_unscored", 0) > 0
    said = " ".join(state["unscored"])
    for reason in (
        "RuntimeError: the judge is out",
        "returned nan",
        "returned str 'very good'",
        "took longer than 5 s",
    ):
        assert reason in said
    assert set(lived.misdeeds()) == {"raise", "NaN", "string", "hang"}


def test_every_group_was_consumed_once_and_none_is_over_stale(lived: World) -> None:
    lived.assert_every_group_was_consumed_once(lived.steps)
    ages = [m["staleness/max"] for m in read_metrics(lived.run)]
    assert 0 < max(ages) <= STALENESS


def test_no_lease_and_no_deadline_follows_the_wall_clock(lived: World) -> None:
    """The clock went an hour ahead, then two hours back, for every process of the run and of its cluster."""
    seen = [m["time"] for m in read_metrics(lived.run)]
    jumps = [b - a for a, b in itertools.pairwise(seen)]
    assert max(jumps) > HOUR - 60 and min(jumps) < -2 * HOUR + 300
    assert lived.assert_ledger_balances(lived.steps)["lease_counts"].get("expired", 0) == 0
    assert max(lived.interrupted[f"clock an hour {way}"] for way in ("ahead", "back")) < 60


def test_grpo_is_a_file_of_values_and_reads_no_demonstration(lived: World) -> None:
    metrics = read_metrics(lived.run)
    assert all(m["share/preference"] == 1.0 for m in metrics)
    told = {key for m in metrics for key in m if "demonstration" in key or key == "expert/nll"}
    assert told == {"queue/skipped_demonstrations"}
    assert all(m["queue/skipped_demonstrations"] == 0 for m in metrics)


def test_nothing_is_left_of_any_life(lived: World) -> None:
    assert lived.left == []


def test_the_engines_held_the_weights_of_the_learner_at_the_end(lived: World) -> None:
    lived.assert_engines_hold_the_learners_weights()
