"""A Ray of our own listens on this machine alone and answers nobody without the run's token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from helpers_cli import ROOT, environment

from cluster.ray_session import LOOPBACK

GUEST = """
import ray, sys
try:
    ray.init(address=sys.argv[1], log_to_driver=False)
    print("nodes", len(ray.nodes()))
except Exception as error:
    print(type(error).__name__, error)
"""
PLANTED = "planted-secret-of-the-environment"


@dataclass
class OwnRay:
    """What a Ray of our own says of itself, and the process that started it."""

    address: str
    token: str
    folder: str
    actor: str
    here: str
    path: list[str]
    jobs: str
    process: psutil.Process


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRay]:
    """In a process of its own: the suite's other tests may have a Ray in this one."""
    own = {name: value for name, value in environment().items() if not name.startswith("RAY_AUTH")}
    starter = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "helpers_own_ray.py")],
        cwd=tmp_path_factory.mktemp("started_here"),
        env=own | {"UNIAPL_REDIS_PASSWORD": PLANTED},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert starter.stdout is not None
        seen = next(line for line in starter.stdout if line.startswith("{"))
        yield OwnRay(**json.loads(seen), process=psutil.Process(starter.pid))
        starter.communicate(timeout=60)
        assert starter.returncode == 0
    finally:
        starter.kill()


def test_everything_listens_on_loopback(session):
    assert session.actor == "127.0.0.1"
    family = [session.process, *session.process.children(recursive=True)]
    listening = [c for process in family for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(listening) > 5
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}, listening


def test_no_part_looks_for_modules_in_the_folder_where_the_run_was_started(session):
    """But for the user's own, which `uniapl/own_code.py` looks for there, last."""
    assert Path(session.here).name.startswith("started_here")
    assert len(session.path) > 3 and session.here not in session.path and "" not in session.path


def test_only_who_has_the_token_is_let_in(session):
    token = "RAY_AUTH_TOKEN"
    guests = [{"RAY_AUTH_MODE": "disabled"}, {token: "0" * 64}, {token: session.token}]
    without, wrong, right = call_as_guests(session.address, guests)
    assert "InvalidAuthToken" in without and "InvalidAuthToken" in wrong and "nodes" not in without + wrong
    assert "nodes 1" in right


def test_neither_token_nor_environment_stand_in_rays_files_or_in_what_it_keeps_of_jobs(session):
    assert "driver_pid" in session.jobs
    assert session.token not in session.jobs and PLANTED not in session.jobs
    folder = Path(session.folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        text = path.read_bytes()
        assert session.token.encode() not in text and PLANTED.encode() not in text, path


def call_as_guests(address: str, environments: list[dict[str, str]]) -> list[str]:
    """What processes of this machine say that connect to `address`, side by side: Ray tries for 20 s to get in."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | LOOPBACK
    guests = [
        subprocess.Popen(
            [sys.executable, "-c", GUEST, address],
            env=own | {"RAY_AUTH_MODE": "token"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments
    ]
    try:
        return [guest.communicate(timeout=90)[0] for guest in guests]
    finally:
        for guest in guests:
            guest.kill()
