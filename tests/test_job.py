"""A run as a Ray job, on a cluster of `ray start` nodes with token authentication: a head and a node for each part.

The job is stopped, submitted again, loses its head and with it the cluster, and is submitted once more to a new one.
The nodes are like those of cluster/aws.yaml: no code of this project is installed there. Where Python would look for it
stand packages that cannot be imported, so that a run has what came with its job, and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_cli import ROOT, litter, shared_memory
from helpers_ray_start import BIN, RayCluster, end, ray_start
from helpers_toy import toy_config

from cluster.checkpoints import newest_checkpoint
from uniapl.runlog import read_metrics

pytestmark = pytest.mark.timeout(1200)
LIMIT_S = 300.0
FIRST = "first-life"
"""Id of the job."""
LAST = 3
"""Steps of the last life."""
REWARD = """
import logging
import sys
import time

if "--resume" not in sys.argv:  # the first life's checkpoints take longer than the 3 s that Ray leaves a job by itself
    from learner.group import LearnerGroup

    save = LearnerGroup.save
    LearnerGroup.save = lambda self, place: (save(self, place), time.sleep(5))


def many_e(prompt, response):
    logging.getLogger("own").warning("judged")
    return response[:10].count("e") / 10
"""
PACKAGES = ("uniapl", "actors", "learner", "cluster")


@dataclass
class Story:
    """What happened to the job."""

    run: Path
    stopped: str = ""
    stopped_at: int = 0
    """Step of the newest checkpoint then, and the last step that was logged."""
    logged: int = 0
    nodes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Where parts ran: by node, how many of each of `PARTS`."""
    scraped: str = ""
    judged: str = ""
    """Of the head's metrics; and of the log of the reward replica."""
    lost: tuple[int, str] = (0, "")
    """Exit status and output of `uniapl submit` when the head died."""
    refused: subprocess.CompletedProcess[str] | None = None
    last: subprocess.CompletedProcess[str] | None = None
    unwaited: subprocess.CompletedProcess[str] | None = None
    ended: str = ""
    """Of a job that nobody waited for, and what Ray said of it and its log afterwards."""
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
    with started(tmp_path_factory.mktemp("ray") / "a") as cluster:
        cluster.join("more", cpus=4, rollout=1000, reward=1000)
        told.token = cluster.environment["RAY_AUTH_TOKEN"]
        stop_it(cluster, project, told)
        lose_the_head(cluster, project, told)
    with started(tmp_path_factory.mktemp("ray") / "b", reward=1000) as cluster:
        finish(cluster, project, told)
        told.litter = litter(before)  # of a cluster that is still up
    told.litter |= litter(before)
    yield told


@contextmanager
def started(folder: Path, **reward: float) -> Iterator[RayCluster]:
    """A head, a node for the learner and one for the engines, or the learner."""
    home = folder / "home"
    for package in PACKAGES:
        (home / package).mkdir(parents=True)
        (home / package / "__init__.py").write_text("raise ImportError('this is not what came with the job')\n")
    (home / "venv/bin").mkdir(parents=True)
    aws = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())
    [command] = [line for line in aws["setup_commands"] if "bin/uniapl" in line]
    subprocess.run(["bash", "-c", command], env=dict(os.environ) | {"HOME": str(home)}, check=True)
    [wait] = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", " ".join(aws["head_start_ray_commands"]))
    own = {"PYTHONPATH": str(home), "RAY_JOB_STOP_WAIT_TIME_S": wait}
    with ray_start(folder, own | {"PATH": f"{home}/venv/bin:{BIN}:{os.environ['PATH']}"}) as cluster:
        cluster.join("ranks", cpus=4, learner=1000)
        cluster.join("engines", cpus=6, learner=1000, rollout=1000, **reward)  # room for all parts that it may get
        yield cluster


def submit(cluster: RayCluster, *words: str) -> list[str]:
    return [str(BIN / "uniapl"), "submit", "job.yaml", f"--address={cluster.dashboard}", *words]


def stop_it(cluster: RayCluster, project: Path, told: Story) -> None:
    """Ray's own command, from a folder with this project's code; some steps; `ray job stop`."""
    others = cluster.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    told.refused = subprocess.run(
        submit(cluster, "--no-wait"), cwd=project, env=others, capture_output=True, text=True, timeout=120
    )
    checkout = shutil.copytree(project, cluster.folder / "checkout")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, checkout / package)
    command = [
        "job",
        "submit",
        f"--address={cluster.dashboard}",
        "--no-wait",
        f"--submission-id={FIRST}",
        "--working-dir=.",
    ]
    sent = cluster.ray(*command, "--", "uniapl", "train", "job.yaml", cwd=checkout)
    assert sent.returncode == 0, sent.stdout
    until(told.run, 3, lambda: logs(cluster))
    told.nodes = {node: {part: len(cluster.of(node, part)) for part in PARTS} for node in cluster.nodes}
    told.scraped = scraped(cluster, "uniapl_step")
    told.judged = "".join(path.read_text() for path in cluster.places["more"].glob("session_latest/logs/worker-*.err"))
    told.metadata = cluster.ray("job", "list", f"--address={cluster.dashboard}").stdout
    stopped = cluster.ray("job", "stop", f"--address={cluster.dashboard}", FIRST)
    told.stopped = stopped.stdout + logs(cluster)
    found = newest_checkpoint(told.run)
    told.stopped_at = found[0] if found else 0
    told.logged = read_metrics(told.run)[-1]["step"]
    assert told.stopped_at, told.stopped


def scraped(cluster: RayCluster, word: str) -> str:
    """What Prometheus would get from the head, once our word is in it."""
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(cluster.metrics["head"], timeout=10) as answer:
            text = answer.read().decode()
        if word in text or time.monotonic() > deadline:
            return text
        time.sleep(1)


def logs(cluster: RayCluster) -> str:
    return cluster.ray("job", "logs", f"--address={cluster.dashboard}", FIRST).stdout


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
            submit(cluster, "--resume", "--json", "run.checkpoint_every=2", "rollout.actors=1"),
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
            told.metadata += cluster.ray("job", "list", f"--address={cluster.dashboard}").stdout
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
    """`uniapl submit` once more, on a new cluster, beside a job without a model that nobody waits for."""
    beside = submit(cluster, "--no-wait", "--json", "run.name=none", f"model.path={project / 'none'}")
    told.unwaited = cluster.run(*beside, cwd=project)
    found = newest_checkpoint(told.run)
    assert found is not None
    told.steps = found[0] + LAST
    told.last = cluster.run(
        *submit(cluster, "--resume", f"run.steps={told.steps}", "rollout.actors=1"), cwd=project, timeout=600
    )
    job = said_of(told.unwaited.stdout)["job"]
    for word in ("status", "logs"):
        told.ended += cluster.ray("job", word, f"--address={cluster.dashboard}", job).stdout


def said_of(output: str) -> dict[str, Any]:
    """What `uniapl submit --json` says of its job."""
    [found] = [json.loads(line) for line in output.splitlines() if line.startswith('{"job"')]
    return dict(found)


def test_a_stopped_job_ends_with_a_checkpoint_and_says_how_to_go_on(story: Story) -> None:
    assert re.search(r"ended by SIGTERM; --resume goes on from step-\d{5}", story.stopped)
    assert "stopped" in story.stopped and "Traceback" not in story.stopped
    assert re.search(r"checkpoint \S+ in [5-9]\.\d s|checkpoint \S+ in \d\d\.\d s", story.stopped)
    assert story.stopped_at == story.logged >= 3


def test_every_part_runs_on_a_node_that_is_meant_for_it(story: Story) -> None:
    """Ranks together, engines apart: `ranks` and `engines` could hold the learner, `engines` and `more` the engines."""
    ranks, engines, queue, reward = PARTS
    assert {node: parts[queue] for node, parts in story.nodes.items()} == dict.fromkeys(story.nodes, 0) | {"head": 1}
    assert sorted(story.nodes[node][ranks] for node in ("ranks", "engines")) == [0, 2]
    assert [story.nodes[node][engines] for node in ("ranks", "engines", "more")] == [0, 1, 1]
    assert [story.nodes[node][reward] for node in ("ranks", "engines", "more")] == [0, 0, 1]
    assert sum(sum(parts.values()) for parts in story.nodes.values()) == 6


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


def test_a_job_that_nobody_waits_for_says_where_to_look_and_goes_on(story: Story) -> None:
    assert story.unwaited is not None
    job = said_of(story.unwaited.stdout)["job"]
    assert story.unwaited.returncode == 0
    assert f"`ray job logs --follow {job}` shows it, `ray job stop {job}` ends it" in story.unwaited.stdout
    assert f"Job '{job}' failed" in story.ended and "Traceback" not in story.ended
    assert re.search(r"^model\.path: .*none", story.ended, re.MULTILINE)
    assert not (story.run.parent / "none").exists()


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
