"""A run as a Ray job, on a cluster of `ray start` nodes with token authentication: a head and a node for each part.

The job is stopped, submitted again, loses its head and with it the cluster, and is submitted once more to a new one.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from helpers_cli import ROOT, mapped_shared_memory, shared_memory
from helpers_ray_start import BIN, RayCluster, end, ray_start
from helpers_toy import toy_config

from cluster.checkpoints import newest_checkpoint
from uniapl.runlog import read_metrics

pytestmark = pytest.mark.timeout(1200)
LIMIT_S = 300.0
LAST = 3
"""Steps of the last life."""
REWARD = """
def many_e(prompt, response):
    return response[:10].count("e") / 10
"""


@dataclass
class Story:
    """What happened to the job."""

    run: Path
    stopped: str = ""
    stopped_at: int = 0
    nodes: dict[str, set[str]] = field(default_factory=dict)
    """Where parts ran: by node, the words of `PARTS`."""
    lost: tuple[int, str] = (0, "")
    """Exit status and output of `uniapl submit` when the head died."""
    refused: subprocess.CompletedProcess[str] | None = None
    last: subprocess.CompletedProcess[str] | None = None
    metadata: str = ""
    watched: list[str] = field(default_factory=list)
    token: str = ""
    steps: int = 0
    litter: set[str] = field(default_factory=set)


PARTS = ("ray::LearnerRank", "ray::RolloutActor", "ray::QueueActor", "ray::ServeReplica")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A user's folder: a configuration, a reward of the user's own, and things that must not travel."""
    shared = tmp_path_factory.mktemp("shared")
    config = toy_config(
        shared,
        tiny,
        run={"name": "job", "steps": 500, "checkpoint_every": 2, "grace_seconds": 60},
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
    with started(tmp_path_factory.mktemp("ray") / "a") as cluster:
        told.token = cluster.environment["RAY_AUTH_TOKEN"]
        stop_it(cluster, project, told)
        lose_the_head(cluster, project, told)
    with started(tmp_path_factory.mktemp("ray") / "b") as cluster:
        finish(cluster, project, told)
        told.litter = shared_memory() - before - mapped_shared_memory(psutil.pids())  # of a cluster that is still up
    told.litter |= shared_memory() - before
    yield told


@contextmanager
def started(folder: Path) -> Iterator[RayCluster]:
    """A head, a node for the learner and one for the engines."""
    with ray_start(folder) as cluster:
        cluster.join("ranks", cpus=4, learner=1000)
        cluster.join("engines", cpus=4, rollout=1000, reward=1000)
        yield cluster


def submit(cluster: RayCluster, *words: str) -> list[str]:
    return [str(BIN / "uniapl"), "submit", "job.yaml", f"--address={cluster.dashboard}", *words]


def stop_it(cluster: RayCluster, project: Path, told: Story) -> None:
    """`uniapl submit --no-wait`, some steps, `ray job stop`."""
    others = cluster.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    told.refused = subprocess.run(
        submit(cluster, "--no-wait"), cwd=project, env=others, capture_output=True, text=True, timeout=120
    )
    sent = cluster.run(*submit(cluster, "--no-wait", "--json"), cwd=project)
    assert sent.returncode == 0, sent.stdout
    job = next(json.loads(line)["job"] for line in sent.stdout.splitlines() if line.startswith("{"))
    until(told.run, 3, lambda: logs(cluster, job))
    told.nodes = {node: {word for word in PARTS if cluster.of(node, word)} for node in cluster.nodes}
    told.metadata = cluster.ray("job", "list", f"--address={cluster.dashboard}").stdout
    stopped = cluster.ray("job", "stop", f"--address={cluster.dashboard}", job)
    told.stopped = stopped.stdout + logs(cluster, job)
    found = newest_checkpoint(told.run)
    told.stopped_at = found[0] if found else 0
    assert told.stopped_at, told.stopped


def logs(cluster: RayCluster, job: str) -> str:
    return cluster.ray("job", "logs", f"--address={cluster.dashboard}", job).stdout


def until(run: Path, step: int, output: Callable[[], str]) -> None:
    """Wait until the run has logged this step."""
    deadline = time.monotonic() + LIMIT_S
    while not (run / "metrics.jsonl").is_file() or max((m["step"] for m in read_metrics(run)), default=0) < step:
        assert time.monotonic() < deadline, output()
        time.sleep(0.2)


def lose_the_head(cluster: RayCluster, project: Path, told: Story) -> None:
    """The same job once more, followed by its user; then the head's machine goes."""
    with (cluster.folder / "followed.txt").open("w+") as output:
        follower = subprocess.Popen(
            submit(cluster, "--resume"),
            cwd=project,
            env=cluster.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            until(told.run, told.stopped_at + 2, lambda: Path(output.name).read_text())
            while "step " not in Path(output.name).read_text():
                assert follower.poll() is None
                time.sleep(0.2)
            told.watched = first_lines(cluster, 3)
            cluster.kill("head")
            status = follower.wait(timeout=LIMIT_S)
        finally:
            end(follower)
        told.lost = status, Path(output.name).read_text()


def first_lines(cluster: RayCluster, number: int) -> list[str]:
    """Of `uniapl watch` in another terminal, which is ended by Ctrl-C then."""
    watcher = subprocess.Popen(
        [str(BIN / "uniapl"), "watch", cluster.dashboard, "--json"],
        env=cluster.environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert watcher.stdout is not None
    try:
        found = [watcher.stdout.readline() for _ in range(number)]
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(timeout=60) == 130
        return found
    finally:
        end(watcher)


def finish(cluster: RayCluster, project: Path, told: Story) -> None:
    """Ray's own command, on a new cluster."""
    found = newest_checkpoint(told.run)
    assert found is not None
    told.steps = found[0] + LAST
    train = ["uniapl", "train", "job.yaml", "--resume", f"run.steps={told.steps}"]
    told.last = cluster.ray(
        "job", "submit", f"--address={cluster.dashboard}", "--working-dir=.", "--", *train, cwd=project, timeout=600
    )


def test_a_stopped_job_ends_with_a_checkpoint_and_says_how_to_go_on(story: Story) -> None:
    assert "ended by SIGTERM; `--resume` goes on from the newest checkpoint" in story.stopped
    assert "stopped" in story.stopped and "Traceback" not in story.stopped


def test_every_part_runs_on_the_node_that_is_meant_for_it(story: Story) -> None:
    ranks, engines, queue, reward = PARTS
    assert story.nodes == {"head": {queue}, "ranks": {ranks}, "engines": {engines, reward}}


def test_who_follows_a_job_learns_that_the_cluster_is_gone(story: Story) -> None:
    status, output = story.lost
    assert status == 2
    assert "step " in output
    assert "Traceback" not in output
    assert "the cluster is gone" in output.splitlines()[-1]


def test_the_job_can_be_watched_from_another_terminal(story: Story) -> None:
    seen = [json.loads(line) for line in story.watched]
    assert [(record["step"], record["steps"]) for record in seen] == [(1, 500), (2, 500), (3, 500)]
    assert all("reward/mean" in record for record in seen)


def test_submitted_again_to_a_new_cluster_the_run_goes_on_to_its_end(story: Story) -> None:
    assert story.last is not None
    assert story.last.returncode == 0, story.last.stdout[-4000:]
    assert "report: " in story.last.stdout
    assert [m["step"] for m in read_metrics(story.run)] == list(range(1, story.steps + 1))
    assert (story.run / "report.html").is_file()


def test_without_the_clusters_token_nobody_submits(story: Story) -> None:
    assert story.refused is not None
    assert story.refused.returncode == 2
    assert len(story.refused.stderr.splitlines()) == 1, story.refused.stderr
    assert story.refused.stderr.startswith("--address: ")


def test_no_secret_is_in_the_jobs_metadata_output_or_run_folder(story: Story) -> None:
    assert "working_dir" in story.metadata
    assert story.last is not None
    texts = [story.metadata, story.stopped, story.lost[1], story.last.stdout]
    texts += [path.read_bytes().decode(errors="replace") for path in story.run.rglob("*") if path.is_file()]
    assert not any(secret in text for text in texts for secret in (story.token, "hunter2"))


def test_no_shared_memory_is_left(story: Story) -> None:
    assert story.litter == set()
