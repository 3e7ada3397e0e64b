"""The lives of a job on clusters of `ray start` nodes, told for tests/test_job.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from helpers_cli import ROOT
from helpers_outside import SECRETS, files_with
from helpers_ray_start import BIN, RayCluster, end, ray_start

from cluster.checkpoints import newest_checkpoint
from uniapl.runlog import read_metrics

LIMIT_S = 300.0
FIRST = "first-life"
"""Id of the job."""
LAST = 3
"""Steps of the last life."""
SECRET = "planted-secret-of-the-nodes"
SLOW = """

import time

_save = LearnerGroup.save
LearnerGroup.save = lambda self, place: (_save(self, place), time.sleep(5))
"""
"""Checkpoints take longer than the 3 s that Ray leaves a job by itself."""
PACKAGES = ("uniapl", "actors", "learner", "cluster")
ALONE = ["run.name=alone", "learner.ranks=1", "objective.preference.weight=0", "objective.demonstration.weight=1"]
ALONE += ["evaluation.prompts=0", "run.steps=50000"]
"""Of a small run without engines."""
APART = {
    "engines": {"CPU": 4, "rollout": 1000},
    "more": {"CPU": 4, "rollout": 1000},
    "rank-a": {"CPU": 1, "learner": 1000},
    "rank-b": {"CPU": 1, "learner": 1000},
    "reward": {"CPU": 2, "reward": 1000},
}
"""Nodes of the first cluster: each of those for the learner holds one rank. The last three join late."""
TOGETHER = {
    "ranks": {"CPU": 4, "learner": 1000},
    "engines": {"CPU": 6, "learner": 1000, "rollout": 1000, "reward": 1000},
}
"""Those of the second: both could hold the learner."""


@dataclass
class Story:
    """What happened to the job."""

    run: Path
    waited: str = ""
    """Of the log while nodes were missing."""
    stopped: str = ""
    stopped_at: int = 0
    """Step of the newest checkpoint then, and the last step that was logged."""
    logged: int = 0
    nodes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Where parts of the first cluster ran: by node, how many of each of `PARTS`."""
    packed: dict[str, dict[str, int]] = field(default_factory=dict)
    """The same of the second."""
    scraped: str = ""
    judged: str = ""
    """Of the head's metrics; and of the log of the reward replica."""
    lost: tuple[int, str] = (0, "")
    """Exit status and output of `uniapl submit` when the head died."""
    refused: subprocess.CompletedProcess[str] | None = None
    last: tuple[int, str] = (1, "")
    alone: str = ""
    """Of a job of `uniapl submit` that was stopped where nodes leave it 3 s."""
    unwaited: subprocess.CompletedProcess[str] | None = None
    ended: str = ""
    """Of a job that nobody waited for, and what Ray said of it and its log afterwards."""
    metadata: str = ""
    watched: list[str] = field(default_factory=list)
    secrets: list[str] = field(default_factory=lambda: [SECRET, "hunter2"])
    """And the tokens of the clusters."""
    leaks: list[Path] = field(default_factory=list)
    """Files of Ray's, on any node, in which one of them stands."""
    steps: int = 0
    litter: set[str] = field(default_factory=set)


PARTS = ("ray::LearnerRank", "ray::RolloutActor", "ray::QueueActor", "ray::ServeReplica")


@contextmanager
def started(
    folder: Path, nodes: dict[str, dict[str, int]], told: Story, *names: str, stop_wait: bool = True
) -> Iterator[RayCluster]:
    """A head, and those of `nodes` that are named; with secrets in their environment, and in the user's.

    Args:
        stop_wait: what cluster/aws.yaml says of the time that a stopped job is left.
    """
    home = folder / "home"
    for package in PACKAGES:
        (home / package).mkdir(parents=True)
        (home / package / "__init__.py").write_text("raise ImportError('this is not what came with the job')\n")
    (home / "venv/bin").mkdir(parents=True)
    aws = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())
    [command] = [line for line in aws["setup_commands"] if "bin/uniapl" in line]
    subprocess.run(["bash", "-c", command], env=dict(os.environ) | {"HOME": str(home)}, check=True)
    [wait] = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", " ".join(aws["head_start_ray_commands"]))
    (home / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(limits(nodes)))
    own = {"PYTHONPATH": str(home), "HOME": str(home), "PATH": f"{home}/venv/bin:{BIN}:{os.environ['PATH']}"}
    own |= {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))}  # what was compiled once
    own |= {"RAY_JOB_STOP_WAIT_TIME_S": wait} if stop_wait else {}
    with ray_start(folder, own | dict.fromkeys(SECRETS, SECRET)) as cluster:
        cluster.environment |= dict.fromkeys(SECRETS, SECRET)
        told.secrets.append(cluster.environment["RAY_AUTH_TOKEN"])
        for name in names:
            join(cluster, nodes, name)
        yield cluster
        for name in list(cluster.nodes):
            cluster.kill(name)
        for place in cluster.places.values():
            told.leaks += files_with(place, *told.secrets)


def limits(nodes: dict[str, dict[str, int]]) -> dict[str, Any]:
    """An autoscaler's configuration that allows one of each of these nodes."""
    types = {name: {"resources": has, "max_workers": 1} for name, has in nodes.items()}
    head = {"head": {"resources": {"CPU": 0}}}
    return {"max_workers": len(nodes), "head_node_type": "head", "available_node_types": head | types}


def join(cluster: RayCluster, nodes: dict[str, dict[str, int]], name: str) -> None:
    marks = dict(nodes[name])
    cluster.join(name, marks.pop("CPU"), **marks)


def submit(cluster: RayCluster, *words: str) -> list[str]:
    return [str(BIN / "uniapl"), "submit", "job.yaml", f"--address={cluster.dashboard}", *words]


def stop_it(cluster: RayCluster, project: Path, checkout: Path, told: Story) -> None:
    """Ray's own command, from a folder with this project's code; nodes that join; some steps; `ray job stop`."""
    others = cluster.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    told.refused = subprocess.run(
        submit(cluster, "--no-wait"), cwd=project, env=others, capture_output=True, text=True, timeout=120
    )
    command = [
        "job",
        "submit",
        f"--address={cluster.dashboard}",
        "--no-wait",
        f"--submission-id={FIRST}",
        "--working-dir=.",
    ]
    for name in ("engines", "more"):  # else both engines would go to the first
        until_written(cluster.folder, f"{name}.log", "Ray runtime started", lambda: name)  # noqa: B023 (called at once)
    sent = cluster.ray(*command, "--", "uniapl", "train", "job.yaml", cwd=checkout)
    assert sent.returncode == 0, sent.stdout
    driver, told_of = f"job-driver-{FIRST}.log", partial(logs, cluster, FIRST)
    until_written(head_logs(cluster), driver, "waiting for nodes: the learner ", told_of)
    join(cluster, APART, "rank-a")
    join(cluster, APART, "rank-b")
    missing = "waiting for nodes: none yet for reward replicas (1), "
    told.waited = until_written(head_logs(cluster), driver, missing, told_of)
    join(cluster, APART, "reward")
    until(told.run, 3, told_of)
    told.nodes = placed(cluster)
    told.watched = first_lines(cluster, 3)
    told.scraped = scraped(cluster, "uniapl_step")
    told.judged = "".join(
        path.read_text() for path in cluster.places["reward"].glob("session_latest/logs/worker-*.err")
    )
    told.metadata = cluster.ray("job", "list", f"--address={cluster.dashboard}").stdout
    stopped = cluster.ray("job", "stop", f"--address={cluster.dashboard}", FIRST)
    told.stopped = stopped.stdout + logs(cluster, FIRST)
    found = newest_checkpoint(told.run)
    told.stopped_at = found[0] if found else 0
    told.logged = read_metrics(told.run)[-1]["step"]
    assert told.stopped_at, told.stopped


def placed(cluster: RayCluster) -> dict[str, dict[str, int]]:
    return {node: {part: len(cluster.of(node, part)) for part in PARTS} for node in cluster.nodes}


def until_written(folder: Path, names: str, words: str, output: Callable[[], str]) -> str:
    """That of the files as soon as `words` are in it; read here, for a Ray command takes the machine for seconds."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := [text for path in folder.glob(names) if words in (text := path.read_text())]):
        assert time.monotonic() < deadline, output()
        time.sleep(0.2)
    return found[0]


def head_logs(cluster: RayCluster) -> Path:
    return cluster.places["head"] / "session_latest/logs"


def scraped(cluster: RayCluster, word: str) -> str:
    """What Prometheus would get from the head, once our word is in it."""
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(cluster.metrics["head"], timeout=10) as answer:
            text = answer.read().decode()
        if word in text or time.monotonic() > deadline:
            return text
        time.sleep(1)


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


def stop_another(cluster: RayCluster, checkout: Path, told: Story) -> None:
    """A small run of `uniapl submit` that is stopped in its first steps."""
    sent = cluster.run(*submit(cluster, "--no-wait", "--json", *ALONE), cwd=checkout)
    job = said_of(sent.stdout)["job"]
    until(told.run.parent / "alone", 1, lambda: logs(cluster, job))
    told.alone = cluster.ray("job", "stop", f"--address={cluster.dashboard}", job).stdout + logs(cluster, job)


def finish(cluster: RayCluster, project: Path, told: Story) -> None:
    """`uniapl submit` once more, on a new cluster, beside a job of too many ranks that nobody waits for."""
    told.unwaited = cluster.run(
        *submit(cluster, "--no-wait", "--json", "run.name=none", "learner.ranks=9"), cwd=project
    )
    found = newest_checkpoint(told.run)
    assert found is not None
    told.steps = found[0] + LAST
    command = submit(cluster, "--resume", f"run.steps={told.steps}", "rollout.actors=1")
    with (cluster.folder / "last.txt").open("w+") as output:
        last = subprocess.Popen(command, cwd=project, env=cluster.environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            words = f"step {found[0] + 1}/{told.steps}"
            until_written(head_logs(cluster), "job-driver-*.log", words, lambda: Path(output.name).read_text())
            told.packed = placed(cluster)
            status = last.wait(timeout=600)
        finally:
            last.kill()
        told.last = status, Path(output.name).read_text()
    job = said_of(told.unwaited.stdout)["job"]
    for word in ("status", "logs"):
        told.ended += cluster.ray("job", word, f"--address={cluster.dashboard}", job).stdout


def said_of(output: str) -> dict[str, Any]:
    """What `uniapl submit --json` says of its job."""
    [found] = [json.loads(line) for line in output.splitlines() if line.startswith('{"job"')]
    return dict(found)
