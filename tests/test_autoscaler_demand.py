"""Rollout actors that are wanted and do not fit stand in `ray status` as demand, and Ray's autoscaler adds nodes."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys

import helpers_autoscaled
from helpers_cli import ROOT, environment


def test_wanted_engines_make_the_autoscaler_add_rollout_nodes_and_the_rest_stays_demand() -> None:
    program = [sys.executable, str(ROOT / "tests/helpers_autoscaled.py")]
    own = {name: value for name, value in environment().items() if not name.startswith("RAY_")}
    own |= helpers_autoscaled.ENVIRONMENT | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    out = subprocess.run(program, env=own, capture_output=True, text=True, timeout=580)
    assert out.returncode == 0, out.stderr[-4000:]
    seen = json.loads(out.stdout.splitlines()[-1])
    assert "no resource demands" in seen["before"]
    assert seen["bundle"] == {"CPU": 1.0, "GPU": 1.0, "rollout": 1.0}
    ask = str(seen["bundle"])
    assert f"{ask}: {helpers_autoscaled.WANTED}+ pending" in seen["asked"]
    rollout = [node for node in seen["nodes"] if "rollout" in node]
    assert [(node["GPU"], node["rollout"]) for node in rollout] == [(1.0, 1000.0)] * helpers_autoscaled.NODES
    assert len(seen["up"]) == helpers_autoscaled.NODES
    missing = helpers_autoscaled.WANTED - helpers_autoscaled.NODES
    assert f"{ask}: {missing}+ pending" in seen["after"]
