"""The plan against a real ZeRO-3 rank: SmolLM2 on a CPU, in a process like the learner's."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_cli import environment

from learner.device import cpu_environment
from uniapl.config import load_config
from uniapl.plan.fit import Machines
from uniapl.plan.pace import Rates
from uniapl.plan.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "local.yaml"


def test_memory_and_broadcast_of_a_real_rank_are_within_15_percent_of_the_plan(smollm2: Path) -> None:
    overrides = [f"model.path={smollm2}", "objective.diagnostics_every=0"]
    plan = make_plan(load_config(CONFIG, overrides), Machines(gpus=0), Rates())
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "plan_rank.py"), str(CONFIG), *overrides],
        env=environment() | cpu_environment() | rank,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    assert plan.learner_bytes == pytest.approx(measured["peak"], rel=0.15)
    assert plan.broadcast_bytes == pytest.approx(measured["sent"], rel=0.001)  # and checksums
