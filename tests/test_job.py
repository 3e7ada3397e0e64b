"""A run as a Ray job, on a cluster of `ray start` nodes with token authentication: a head and a node for each part.

The job waits for nodes that join later, is stopped, submitted again, loses its head and with it the cluster, and is
submitted once more to a new one. The nodes are like those of cluster/aws.yaml: no code of this project is installed
there. Where Python would look for it stand packages that cannot be imported, so that a run has what came with its job,
and nothing else. In the head's home is what `ray up` leaves there, an autoscaler's limits; nodes are added by the test.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_cli import ROOT, litter, shared_memory
from helpers_job import (
    APART,
    PACKAGES,
    PARTS,
    SLOW,
    TOGETHER,
    Story,
    finish,
    lose_the_head,
    said_of,
    started,
    stop_another,
    stop_it,
)
from helpers_outside import files_with
from helpers_toy import toy_config

from cluster.checkpoints import newest_checkpoint
from uniapl.runlog import read_metrics

pytestmark = pytest.mark.timeout(1200)
REWARD = """
import logging


def many_e(prompt, response):
    logging.getLogger("own").warning("judged")
    return response[:10].count("e") / 10
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A user's folder: a configuration, a reward of the user's own, and things that must not travel."""
    shared = tmp_path_factory.mktemp("shared")
    config = toy_config(
        shared,
        tiny,
        run={"name": "job", "steps": 500, "checkpoint_every": 1000, "grace_seconds": 60},
        rollout={"actors": 2},
        learner={"ranks": 2},
        reward={"functions": [{"name": "own_reward:many_e"}]},
    )
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(config, folder / "job.yaml")
    (folder / "own_reward.py").write_text(REWARD)
    (folder / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    (folder / ".env").write_text("PASSWORD=hunter2\n")
    return folder


@pytest.fixture(scope="module")
def story(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    before = shared_memory()
    run = Path(re.search(r"folder: (\S+)", (project / "job.yaml").read_text())[1]) / "job"  # type: ignore[index]
    told = Story(run)
    checkout = shutil.copytree(project, tmp_path_factory.mktemp("copy") / "checkout")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, checkout / package)
    with (checkout / "learner/group.py").open("a") as code:
        code.write(SLOW)
    with started(tmp_path_factory.mktemp("ray") / "a", APART, told, "engines", "more") as cluster:
        stop_it(cluster, project, checkout, told)
        lose_the_head(cluster, project, told)
    with started(tmp_path_factory.mktemp("ray") / "b", TOGETHER, told, *TOGETHER, stop_wait=False) as cluster:
        stop_another(cluster, checkout, told)
        finish(cluster, project, told)
        told.litter = litter(before)  # of a cluster that is still up
    told.litter |= litter(before)
    yield told


def test_a_stopped_job_ends_with_a_checkpoint_and_says_how_to_go_on(story: Story) -> None:
    assert re.search(r"ended by SIGTERM; --resume goes on from step-\d{5}", story.stopped)
    assert "stopped" in story.stopped and "Traceback" not in story.stopped
    assert re.search(r"checkpoint \S+ in [5-9]\.\d s|checkpoint \S+ in \d\d\.\d s", story.stopped)
    assert story.stopped_at == story.logged >= 3


def test_a_job_that_uniapl_sent_has_its_time_to_stop_where_nodes_say_nothing_of_it(story: Story) -> None:
    found = newest_checkpoint(story.run.parent / "alone")
    assert found is not None, story.alone
    assert f"ended by SIGTERM; --resume goes on from step-{found[0]:05d}" in story.alone
    assert re.search(r"checkpoint \S+ in [5-9]\.\d s|checkpoint \S+ in \d\d\.\d s", story.alone)
    assert "Traceback" not in story.alone and found[0] == read_metrics(story.run.parent / "alone")[-1]["step"]


def test_what_a_job_waits_for_stands_in_its_log(story: Story) -> None:
    """Nodes of the kinds that the autoscaler may add are waited for, though none of them is there yet."""
    limit = r"for at most 600 s \(cluster\.start_timeout_s\)"
    learner = r"needs 2 CPU \(of \S+ in the cluster \S+ are free\), 2 learner \(of 0 in the cluster 0 are free\); "
    assert re.search(rf"waiting for nodes: the learner \(learner\.ranks: 2\) {learner}{limit}", story.waited)
    assert "for reward replicas (1), see `ray status`; the run begins with 2 engines, within 600 s" in story.waited
    assert "placed for CPUs (no node there has a GPU, and none that an autoscaler is known to add), " in story.waited
    assert ", where nodes are marked learner, reward, rollout on those" in story.waited
    assert "] step 1/500" not in story.waited


def test_every_part_runs_on_a_node_that_is_meant_for_it(story: Story) -> None:
    """Engines apart, and ranks where one node does not hold them: `engines` and `more` could hold both engines."""
    ranks, engines, queue, reward = PARTS
    meant = {node: dict.fromkeys(PARTS, 0) for node in ("head", *APART)}
    meant["head"][queue] = meant["reward"][reward] = 1
    meant["rank-a"][ranks] = meant["rank-b"][ranks] = meant["engines"][engines] = meant["more"][engines] = 1
    assert story.nodes == meant


def test_ranks_are_on_one_node_where_one_can_hold_them(story: Story) -> None:
    ranks, engines, queue, reward = PARTS
    assert sorted(story.packed[node][ranks] for node in TOGETHER) == [0, 2]
    assert story.packed["engines"] | {ranks: 0} == dict.fromkeys(PARTS, 0) | {engines: 1, reward: 1}
    assert story.packed["head"] == dict.fromkeys(PARTS, 0) | {queue: 1}


def test_prometheus_gets_the_runs_metrics_from_the_head(story: Story) -> None:
    line = re.search(r"^ray_uniapl_step\{(.*)\} ([0-9.]+)$", story.scraped, re.MULTILINE)
    assert line is not None and 'run="job"' in line[1] and float(line[2]) >= 1


def test_a_users_own_log_lines_say_where_they_come_from(story: Story) -> None:
    assert "WARNING run=job step=- actor=reward own: judged" in story.judged


def test_who_follows_a_job_learns_that_the_cluster_is_gone(story: Story) -> None:
    status, output = story.lost
    assert status == 2
    assert "step " in output
    assert "Traceback" not in output
    assert "the cluster is gone" in output.splitlines()[-1]
    job = said_of(output)
    assert job["job"] in story.metadata and 0 < job["bytes"] < 2 << 20


def test_a_job_of_rays_own_command_can_be_watched_from_another_terminal(story: Story) -> None:
    seen = [json.loads(line) for line in story.watched]
    assert [(record["step"], record["steps"]) for record in seen] == [(1, 500), (2, 500), (3, 500)]
    assert all("reward/mean" in record for record in seen)


def test_submitted_again_to_a_new_cluster_the_run_goes_on_to_its_end(story: Story) -> None:
    status, output = story.last
    assert status == 0, output[-4000:]
    assert "report: " in output
    assert [m["step"] for m in read_metrics(story.run)] == list(range(1, story.steps + 1))
    assert (story.run / "report.html").is_file()


def test_a_job_that_nobody_waits_for_says_where_to_look_and_goes_on(story: Story) -> None:
    assert story.unwaited is not None
    job = said_of(story.unwaited.stdout)["job"]
    assert story.unwaited.returncode == 0
    assert f"`ray job logs --follow {job}` shows it, `ray job stop {job}` ends it" in story.unwaited.stdout
    assert f"Job '{job}' failed" in story.ended and "Traceback" not in story.ended


def test_what_the_autoscaler_could_never_add_is_told_before_anything_starts(story: Story) -> None:
    parts = "9 for the learner (learner.ranks) and 1 for the reward replicas (reward.min_replicas) and "
    line = f"cluster: needs 12 CPU, {parts}2 for the engines (rollout.actors); "
    assert f"\n{line}the cluster has 10, the autoscaler's limit is 10\n" in story.ended
    assert "loading" not in story.ended


def test_without_the_clusters_token_nobody_submits(story: Story) -> None:
    assert story.refused is not None
    assert story.refused.returncode == 2
    assert len(story.refused.stderr.splitlines()) == 1, story.refused.stderr
    assert story.refused.stderr.startswith("--address: ")


def test_no_secret_is_in_the_jobs_metadata_output_or_run_folder_or_in_rays_folder_of_any_node(story: Story) -> None:
    assert "working_dir" in story.metadata and str(story.run) in story.metadata
    texts = [story.metadata, story.stopped, story.lost[1], story.last[1], story.alone, story.ended, story.scraped]
    assert [text for text in texts for secret in story.secrets if secret in text] == []
    assert files_with(story.run.parent, *story.secrets) + story.leaks == []


def test_no_shared_memory_is_left(story: Story) -> None:
    assert story.litter == set()
