"""A Ray of our own listens on this machine alone and answers nobody without the run's token."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from cluster.ray_session import LOOPBACK, ray_session
from learner.worker import LearnerRank
from uniapl.config import Config

GUEST = """
import ray, sys
try:
    ray.init(address=sys.argv[1], log_to_driver=False)
    print("nodes", len(ray.nodes()))
except Exception as error:
    print(type(error).__name__, error)
"""
PLANTED = "planted-secret-of-the-environment"


@pytest.fixture(scope="module")
def session() -> Iterator[tuple[str, str]]:
    """The address of our Ray, with one actor up, and the run's token."""
    config = Config.model_validate({"model": {"path": "m"}, "data": {"train": ["t"], "heldout": ["h"]}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIAPL_REDIS_PASSWORD", PLANTED)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with ray_session(config):
            rank = ray.remote(LearnerRank).remote(0, config)
            host, _ = ray.get(rank.address.remote())
            assert host == "127.0.0.1"
            yield ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"]
        assert os.environ["RAY_AUTH_MODE"] == "disabled" and not {"RAY_AUTH_TOKEN", *LOOPBACK} & os.environ.keys()


def test_everything_listens_on_loopback(session):
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [c for process in family for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(listening) > 5
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}, listening


def test_only_who_has_the_token_is_let_in(session):
    token = "RAY_AUTH_TOKEN"
    guests = [{"RAY_AUTH_MODE": "disabled"}, {token: "0" * 64}, {token: session[1]}]
    without, wrong, right = call_as_guests(session[0], guests)
    assert "InvalidAuthToken" in without and "InvalidAuthToken" in wrong and "nodes" not in without + wrong
    assert "nodes 1" in right


def test_neither_token_nor_environment_stand_in_rays_files(session):
    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        text = path.read_bytes()
        assert session[1].encode() not in text and PLANTED.encode() not in text, path


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
