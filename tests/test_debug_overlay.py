"""A configuration for a cluster, trained on one machine with three overrides, as docs/cluster.md says."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_cli import ROOT, assert_memory_freed, shared_memory, start
from helpers_debug import DEBUG_DATA, debug_overrides

from uniapl.runlog import read_metrics


@pytest.mark.chaos  # minutes of a real engine, learner and model
@pytest.mark.parametrize("data", DEBUG_DATA)
def test_a_recipe_for_a_cluster_makes_its_two_steps_with_three_overrides(
    data: str, smollm2: Path, tmp_path: Path
) -> None:
    before = shared_memory()
    methods, overrides = debug_overrides(data, smollm2, tmp_path)
    words = [word for method in methods for word in ("-m", method)] + overrides
    process = start(Path("configs/qwen3-32b.yaml"), *words, f"run.folder={tmp_path}", "run.name=debug", folder=ROOT)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-4000:]
    assert output.rstrip().endswith(f"report: {tmp_path / 'debug' / 'report.html'}")
    metrics = read_metrics(tmp_path / "debug")
    assert [m["step"] for m in metrics] == [1, 2]
    for m in metrics:
        assert {"loss/preference", "loss/demonstration", "loss/adversarial", "loss/total"} <= m.keys()
        assert m["learner/grad_norm"] > 0 and m["broadcast/engines"] == 1.0
    assert_memory_freed(before)
