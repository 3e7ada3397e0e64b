"""One asynchronous run, two rollout actors and two learner ranks, on a cluster that grows, shrinks and grows again."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers_cli import ROOT, assert_memory_freed, batch_rows, shared_memory, start
from helpers_toy import toy_config
from ray.cluster_utils import Cluster

from uniapl.data.encoding import ChatEncoder
from uniapl.runlog import read_metrics

STEPS = 50
GROUPS = 4
STALENESS = 2
LIMIT_S = 540.0


@dataclass
class Run:
    """What the run showed, and what was seen of its processes."""

    folder: Path
    lines: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def output(self) -> str:
        return "".join(self.lines)


def titles(mark: str, word: str) -> dict[int, str]:
    """Processes of the cluster that was started with `TOY_SLOW=mark`, orphans too, by a word of their title."""
    found = {}
    for process in psutil.process_iter():
        try:
            title = " ".join(process.cmdline())
            if word in title and process.environ().get("TOY_SLOW") == mark:
                found[process.pid] = title
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def below(node: Any, word: str) -> int:
    """How many processes of a node have `word` in their title."""
    found = 0
    for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += word in " ".join(process.cmdline())
    return found


def read_until(process: subprocess.Popen[str], pattern: str, lines: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return
    raise AssertionError(f"the run ended before {pattern!r}:\n{''.join(lines)[-4000:]}")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While it exists rewards are slow, so that steps do not pass before an engine has started."""
    path = tmp_path_factory.mktemp("fleet") / "slow"
    path.touch()
    return path


@pytest.fixture(scope="module")
def cluster(slow: Path) -> Iterator[Cluster]:
    """A head with room for two learner ranks and one engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        patch.setenv("TOY_SLOW", str(slow))
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
        yield started
        started.shutdown()


@pytest.fixture(scope="module")
def run(cluster: Cluster, slow: Path, tiny: Path) -> Run:
    config = toy_config(
        slow.parent,
        tiny,
        run={"name": "fleet", "steps": STEPS, "checkpoint_every": 0},
        rollout={"actors": 2, "min_actors": 1, "groups_in_flight": 4},
        reward={"functions": [{"name": "helpers_toy:many_e_slowly"}]},
        queue={"groups_per_step": GROUPS, "max_staleness": STALENESS},
        learner={"ranks": 2, "learning_rate": 1e-3},
        cluster={"address": cluster.address},
    )
    seen = Run(slow.parent / "runs" / "fleet")
    before = shared_memory()
    process = start(config, "-m", str(ROOT / "configs" / "methods" / "grpo.yaml"))
    watchdog = threading.Timer(LIMIT_S, process.kill)
    watchdog.start()
    try:
        # The head is full with these three; only then is there a node for the second engine.
        while below(cluster.head_node, "LearnerRank") < 2 or below(cluster.head_node, "RolloutActor") < 1:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.2)
        node = cluster.add_node(num_cpus=1)
        read_until(process, r"engines 2", seen.lines)
        cluster.remove_node(node, allow_graceful=False)
        read_until(process, r"lost rollout-1", seen.lines)
        cluster.add_node(num_cpus=1)
        read_until(process, r"engines 1", seen.lines)
        read_until(process, r"engines 2", seen.lines)
        slow.unlink()
        rest, _ = process.communicate()
        seen.lines.append(rest)
    finally:
        watchdog.cancel()
        process.kill()
    assert process.returncode == 0, seen.output[-4000:]
    for word in ("RolloutActor", "EngineCore", "LearnerRank"):
        seen.left += titles(str(slow), word).values()
    assert_memory_freed(before)
    return seen


def test_the_run_goes_on_when_a_node_leaves_and_another_comes(run: Run) -> None:
    metrics = read_metrics(run.folder)
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    members = [m["fleet/members"] for m in metrics]
    changes = [now for before, now in zip([0.0, *members], members, strict=False) if now != before]
    assert changes in ([1.0, 2.0, 1.0, 2.0], [2.0, 1.0, 2.0]), "it may begin with one"
    lost = re.findall(r"lost (rollout-\d): ", run.output)
    assert set(lost) == {"rollout-1"}, run.output
    assert len(lost) <= 2, "Ray may start one more on the node that is about to be known as gone"
    assert metrics[-1]["fleet/lost"] == metrics[-1]["fleet/restarts"] == len(lost)


def test_every_group_was_consumed_once_and_none_is_over_stale(run: Run) -> None:
    batches = batch_rows(run.folder)
    assert len(batches) == STEPS
    samples = [row for batch in batches for row in batch]
    leases = Counter(row["lease_id"] for row in samples)
    assert (len(leases), set(leases.values())) == (STEPS * GROUPS, {4})
    assert {row["actor"] for row in samples} == {"rollout-0", "rollout-1"}
    ages = [m["staleness/max"] for m in read_metrics(run.folder)]
    assert 0 < max(ages) <= STALENESS


def test_grpo_is_a_file_of_values_and_reads_no_demonstration(run: Run) -> None:
    metrics = read_metrics(run.folder)
    assert all(m["share/preference"] == 1.0 for m in metrics)
    assert not any("demonstration" in key or key == "expert/nll" for m in metrics for key in m)
    assert {row["kind"] for batch in batch_rows(run.folder) for row in batch} == {"sample"}


def test_nothing_is_left_of_engines_and_ranks(run: Run) -> None:
    assert run.left == []


def test_the_engine_held_the_weights_of_the_learner_at_the_end(run: Run) -> None:
    """Its greedy responses in the last evaluation are those of the model that the learner wrote."""
    import torch
    from transformers import AutoModelForCausalLM

    encoder = ChatEncoder.from_folder(run.folder / "model")
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    before, after = (json.loads((run.folder / "eval" / f"{name}.json").read_text()) for name in ("before", "after"))
    said = [sample["response"] for sample in after["samples"]]
    assert said != [sample["response"] for sample in before["samples"]], "training changed what it says"
    for sample in after["samples"]:
        prompt = encoder.prompt_ids([{"role": "user", "content": sample["prompt"]}])
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
        assert encoder.decode(ids[0, len(prompt) :].tolist()) == sample["response"]
