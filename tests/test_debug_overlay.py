"""A configuration for a cluster, trained on one machine with one overlay, as docs/cluster.md says."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_cli import ROOT, assert_memory_freed, shared_memory, start

from uniapl.runlog import read_metrics


@pytest.mark.chaos  # minutes of a real engine, learner and model
def test_a_recipe_for_a_cluster_makes_its_two_steps_with_the_overlay(smollm2: Path, tmp_path: Path) -> None:
    before = shared_memory()
    overlay = ["-m", "configs/debug/one-machine.yaml", f"model.path={smollm2}", f"run.folder={tmp_path}"]
    process = start(Path("configs/qwen3-32b.yaml"), *overlay, "run.name=debug", folder=ROOT)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-4000:]
    assert output.rstrip().endswith(f"report: {tmp_path / 'debug' / 'report.html'}")
    metrics = read_metrics(tmp_path / "debug")
    assert [m["step"] for m in metrics] == [1, 2]
    for m in metrics:
        assert {"loss/preference", "loss/demonstration", "loss/adversarial", "loss/total"} <= m.keys()
        assert m["learner/grad_norm"] > 0 and m["broadcast/engines"] == 1.0
    assert_memory_freed(before)
