"""An asynchronous run that is killed and goes on with other numbers of ranks and rollout actors, until Ctrl-C."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers_batches import assert_demonstrations_in_order
from helpers_cli import ROOT, batch_rows, killed, signalled
from helpers_replay import replayed
from helpers_toy import toy_config, write_shard
from killed_train import UNDER_WAY
from slow_checkpoints import FILE, MORE_GROUPS

from cluster.checkpoints import newest_checkpoint
from uniapl.analysis import Evaluation
from uniapl.config import load_config
from uniapl.data.sources import open_sources
from uniapl.runlog import read_metrics

pytestmark = pytest.mark.timeout(1200)  # the fixture is two whole runs
STALENESS, EVERY, GROUPS, DEMONSTRATIONS = 2, 3, 8, 4
ROWS = 64
"""In the shards."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Any]:
    """The run's folder, and what was seen of each of its two lives."""
    folder = tmp_path_factory.mktemp("resume-async")
    site = install_example(folder)
    config = toy_config(
        folder,
        tiny,
        run={"name": "toy", "steps": 200, "checkpoint_every": EVERY},
        rollout={"actors": 1, "groups_in_flight": 2, "dtype": "bfloat16"},
        queue={"groups_per_step": GROUPS, "demonstrations_per_step": DEMONSTRATIONS, "max_staleness": STALENESS},
        # The second one weighs nothing: it makes the reward wait (slow_checkpoints.py).
        reward={
            "functions": [
                {"name": "my_task.reward:animal_list"},
                {"name": "helpers_toy:many_e_faulty", "weight": 0.0},
            ]
        },
        objective={"adversarial": {"weight": 0.1, "discriminator": "my_task.discriminator:WordOverlap"}},
        learner={"ranks": 2, "dtype": "bfloat16"},
        evaluation={"prompts": 0},
    )
    run = folder / "runs" / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_SLOW", str(folder / "switch"))
        patch.setenv("PYTHONPATH", str(site))
        patch.syspath_prepend(site)
        write_example(folder)
        return {"run": run, "config": config} | both_lives(config, run)


def install_example(folder: Path) -> Path:
    """The package of examples/own_task as pip installs it; where that is."""
    source, site = folder / "own_task", folder / "site"
    shutil.copytree(ROOT / "examples" / "own_task", source)  # setuptools builds beside the code
    here = ("--no-index", "--no-deps", "--no-build-isolation", "--quiet", "--target", str(site))
    subprocess.run([sys.executable, "-m", "pip", "install", *here, str(source)], check=True, timeout=120)
    shutil.rmtree(source)
    return site


def write_example(folder: Path) -> None:
    """The example's prompts in the place of the toy's, every other one with its expert's response."""
    from my_task.prompts import row

    rows = [row(number) | ({"response": None} if number % 2 else {}) for number in range(ROWS + 8)]
    write_shard(folder / "train-0.arrow", rows[: ROWS // 2])
    write_shard(folder / "train-1.arrow", rows[ROWS // 2 : ROWS])
    write_shard(folder / "heldout.arrow", rows[ROWS:])


def both_lives(config: Path, run: Path) -> dict[str, Any]:
    *_, line = killed(config, "broadcast:7:0.005", program="slow_checkpoints.py")
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    first = {
        "killed": line,
        "kept": kept,
        "steps": len(read_metrics(run)),
        "queue": queue_of(run / "checkpoints" / kept[-1]),
    }
    others = ("learner.ranks=1", "rollout.actors=2", "evaluation.prompts=8", "evaluation.every=3", "--resume")
    status, output = signalled(config, "step 14/", signal.SIGINT, *others)
    return {"first": first, "status": status, "output": output}


def queue_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "queue.json").read_text())


@pytest.fixture(scope="module")
def last(seen: dict[str, Any]) -> tuple[int, dict[str, Any], list[list[dict[str, Any]]]]:
    """Of the newest checkpoint: its step, its queue, and the rows of the batches up to it."""
    found = newest_checkpoint(seen["run"])
    assert found is not None
    return found[0], queue_of(found[1]), batch_rows(seen["run"])[: found[0]]


def groups(batch: list[dict[str, Any]]) -> dict[int, str]:
    """The prompt of every group of a batch, by lease."""
    return {row["lease_id"]: row["prompt_id"] for row in batch if row["kind"] == "sample"}


def test_a_kill_in_a_broadcast_leaves_the_checkpoints_before(seen: dict[str, Any]) -> None:
    assert seen["first"]["killed"] == UNDER_WAY
    assert (seen["first"]["kept"], seen["first"]["steps"]) == (["step-00003", "step-00006"], 6)
    assert seen["first"]["queue"]["ready"], "groups that the next life is to use"


def test_the_steps_of_both_lives_are_one_sequence(seen: dict[str, Any], last: Any) -> None:
    assert last[0] >= 12
    assert [m["step"] for m in read_metrics(seen["run"])][: last[0]] == list(range(1, last[0] + 1))
    assert [row["step"] for batch in last[2] for row in batch[:1]] == list(range(last[0]))


def test_no_group_is_lost_or_consumed_twice(seen: dict[str, Any], last: Any) -> None:
    """Every prompt that was drawn was consumed, stands ready or waits, each as often as it was drawn."""
    _, queue, batches = last
    leases = [lease for batch in batches for lease in groups(batch)]
    assert len(leases) == len(set(leases)) == last[0] * GROUPS
    assert len([row for batch in batches for row in batch if row["kind"] == "sample"]) == 4 * len(leases)
    assert not {"dropped_unscored", "dropped_straggler"} & {key for key, count in queue["counts"].items() if count}
    consumed = [prompt for batch in batches for prompt in groups(batch).values()]
    kept = [entry["task"]["prompt"]["id"] for entry in queue["ready"]]
    kept += [task["prompt"]["id"] for task in queue["waiting"]]
    prompts, _ = open_sources(load_config(seen["config"]))
    assert prompts is not None
    drawn = [prompts.next().id for _ in range(queue["next_sequence"])]
    assert Counter(consumed + kept) == Counter(drawn)
    assert len(drawn) > ROWS, "more than one epoch"


def test_groups_that_stood_ready_in_the_checkpoint_are_consumed(seen: dict[str, Any], last: Any) -> None:
    ready = {entry["lease_id"] for entry in seen["first"]["queue"]["ready"]}
    assert ready & groups(last[2][6]).keys()


def test_no_demonstration_is_skipped_or_repeated(seen: dict[str, Any], last: Any) -> None:
    assert_demonstrations_in_order(seen["config"], last[2], DEMONSTRATIONS)


def test_staleness_is_bounded_from_the_first_step_after_the_resume_on(seen: dict[str, Any], last: Any) -> None:
    samples = [row for batch in last[2] for row in batch if row["kind"] == "sample"]
    ages = [(row["step"], row["step"] - span["version"]) for row in samples for span in row["versions"]]
    assert {age for _, age in ages} <= set(range(STALENESS + 1))
    assert max(age for step, age in ages if step < 6) > 0 < max(age for step, age in ages if step >= 6)
    assert {m["staleness/max"] for m in read_metrics(seen["run"])} <= {0.0, 1.0, 2.0}


def test_the_reward_and_the_discriminator_of_an_installed_package_judge_every_group(seen: dict[str, Any]) -> None:
    checks = {"check/animals:count", "check/animals:one_word_each", "check/animals:no_repeats"}
    for m in read_metrics(seen["run"]):
        assert checks <= m.keys()
        assert m["reward/mean"] == pytest.approx(sum(m[check] for check in checks) / 3)
        assert 0 < m["discriminator/paired"] < 1
        assert m["discriminator/expert_mean"] == 1.0, "its words against themselves"


def test_a_step_of_stale_samples_in_bfloat16_is_replayed(seen: dict[str, Any]) -> None:
    """From a checkpoint before it, behind an update that is made again, as a program reads it."""
    stale = [m for m in read_metrics(seen["run"]) if m["staleness/max"] > 0 and m["step"] % EVERY == 2]
    found = replayed(seen["run"], stale[-1]["step"])
    assert found["reproduced"] is True
    for key in ("loss/total", "loss/preference", "loss/adversarial", "importance/p50", "learner/grad_norm"):
        assert found["recorded"][key] == stale[-1][key]
        assert found["replayed"][key] == pytest.approx(stale[-1][key], rel=2e-2, abs=2e-2)
    assert found["recorded"]["kl/behaviour"] > 0


def test_the_second_life_had_another_number_of_ranks(seen: dict[str, Any]) -> None:
    line = "step-00006 was saved by 2 learner ranks: DeepSpeed's universal checkpoint is made of it"
    assert line in seen["output"]
    assert [path.name for path in seen["run"].rglob("*.universal")] == []


def test_the_second_life_had_another_number_of_actors(last: Any) -> None:
    actors = [{row["actor"] for row in batch if row["kind"] == "sample"} for batch in last[2]]
    assert set().union(*actors[:6]) == {"rollout-0"}
    assert set().union(*actors[6:]) == {"rollout-0", "rollout-1"}


def test_groups_are_made_while_a_rank_writes_its_part_of_a_checkpoint(seen: dict[str, Any]) -> None:
    lines = [[int(number) for number in line.split()] for line in (seen["run"] / FILE).read_text().splitlines()]
    assert [step for step, _, _ in lines] == [3, 6]
    assert min(after - before for _, before, after in lines) >= MORE_GROUPS


def test_evaluations_go_on_beside_generation_and_say_which_versions_they_are_of(seen: dict[str, Any]) -> None:
    found = [Evaluation.load(path) for path in sorted((seen["run"] / "eval").glob("step-*.json"))]
    assert len(found) >= 2
    metrics = {m["eval/step"]: m for m in read_metrics(seen["run"]) if "eval/step" in m}
    for evaluation in found:
        assert (evaluation.step % 3, len(evaluation.samples)) == (0, 8)
        assert evaluation.versions[0] >= evaluation.step
        assert evaluation.versions[-1] <= metrics[evaluation.step]["step"]
        assert metrics[evaluation.step]["eval/versions"] == len(evaluation.versions)
        assert "time/evaluate" not in metrics[evaluation.step], "nothing waits for it"


def test_ctrl_c_ends_the_run_with_a_folder_that_can_be_read(seen: dict[str, Any]) -> None:
    assert seen["status"] == 130
    assert re.search(r"stopped by Ctrl-C; --resume goes on from step-\d{5}$", seen["output"].rstrip())
    assert "<svg" in (seen["run"] / "report.html").read_text()
