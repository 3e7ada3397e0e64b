"""The expert's NLL as a constraint: its weight follows it, and holds it while the reward rises."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from helpers_zero import run_ranks

TARGET = 3.0
STEPS = 90
REWARD = {"preference": {"weight": 1.0}}
FOLLOWED = {"kind": "lagrangian", "value": 0.3, "target": TARGET, "rate": 0.03, "max": 1.0}
ONLY_MEASURED = {"kind": "lagrangian", "value": 0.0, "rate": 0.0}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """The reward wants the letter e, the expert never writes one."""
    spec: dict[str, Any] = {
        "model": str(tiny),
        "runs": {
            "followed": {"objective": REWARD | {"demonstration": {"weight": FOLLOWED}}, "steps": STEPS},
            "free": {"objective": REWARD | {"demonstration": {"weight": ONLY_MEASURED}}, "steps": 40},
        },
    }
    out = run_ranks("rank_lagrangian", tmp_path_factory.mktemp("lagrangian") / "out", 1, spec)
    return json.loads((out / "steps.json").read_text())


def test_without_weight_the_expert_becomes_unlikelier_while_it_is_measured(runs: Any) -> None:
    assert all(m["weight/demonstration"] == 0.0 for m in runs["free"])
    assert runs["free"][-1]["expert/nll"] > 2 * TARGET


def test_the_expert_is_held_near_the_target_while_the_reward_rises(runs: Any) -> None:
    first, later = runs["followed"][0], runs["followed"][STEPS * 2 // 3 :]
    assert first["expert/nll"] > 1.5 * TARGET
    assert all(m["expert/nll"] < 1.5 * TARGET for m in later)
    assert fmean(m["expert/nll"] for m in later) == pytest.approx(TARGET, rel=0.15)
    assert fmean(m["reward/mean"] for m in later) > first["reward/mean"] + 0.4


def test_the_weight_follows_the_measurement_step_by_step(runs: Any) -> None:
    for now, after in zip(runs["followed"], runs["followed"][1:], strict=False):
        moved = now["weight/demonstration"] + FOLLOWED["rate"] * (now["expert/nll"] - TARGET)
        assert after["weight/demonstration"] == pytest.approx(min(1.0, max(0.0, moved)))
    weights = [m["weight/demonstration"] for m in runs["followed"]]
    assert max(weights) > FOLLOWED["value"] > min(weights)
