"""The command line as a user runs it: real Ray, vLLM, ZeRO-3, Serve and Arrow files on a tiny model."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pyarrow as pa
import pytest
from helpers_cli import ROOT, assert_memory_freed, batch_rows, shared_memory, signalled, start, train
from helpers_toy import toy_config

from uniapl.runlog import read_metrics

PARTS = ("generate", "score", "wait", "train", "broadcast", "other")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


class TestWholeSystem:
    """Two rollout actors, two learner ranks, all three terms."""

    @pytest.fixture(scope="class")
    def run(self, folder: Path, tiny: Path) -> tuple[str, Path]:
        config = toy_config(
            folder / "whole",
            tiny,
            run={"name": "whole", "steps": 12, "checkpoint_every": 0},
            rollout={"actors": 2, "groups_in_flight": 4},
            learner={"ranks": 2},
            objective={"adversarial": {"weight": 0.1, "discriminator": "embedding"}},
        )
        before = shared_memory()
        output = train(config)
        assert_memory_freed(before)
        return output, folder / "whole" / "runs" / "whole"

    def test_the_reward_of_a_learnable_task_rises(self, run: tuple[str, Path]) -> None:
        rewards = [m["reward/mean"] for m in read_metrics(run[1])]
        assert len(rewards) == 12
        assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2

    def test_the_expert_becomes_likelier(self, run: tuple[str, Path]) -> None:
        nll = [m["expert/nll"] for m in read_metrics(run[1])]
        assert nll[-1] < 0.7 * nll[0]

    def test_every_term_is_in_every_step(self, run: tuple[str, Path]) -> None:
        for m in read_metrics(run[1]):
            assert {"loss/preference", "loss/demonstration", "loss/adversarial"} <= m.keys()
            assert m["share/preference"] + m["share/demonstration"] + m["share/adversarial"] == pytest.approx(1.0)
            assert ("gradient/norm_preference" in m) == ("entropy/exact" in m) == (m["step"] in (1, 11))
            assert (m["weight/preference"], m["weight/demonstration"], m["weight/adversarial"]) == (0.5, 0.5, 0.1)
            assert m["importance/min"] <= m["importance/p50"] <= m["importance/max"]
            assert m["staleness/max"] == 0.0
            assert m["kl/behaviour"] < 1e-6, "engine and learner hold the same weights at every step"

    def test_the_times_of_a_step_add_up(self, run: tuple[str, Path]) -> None:
        for m in read_metrics(run[1]):
            assert sum(m[f"time/{part}"] for part in PARTS) == pytest.approx(m["time/step"], rel=0.05)
            assert all(m[f"time/{part}"] >= 0 for part in PARTS)
            assert (m["fleet/members"], m["fleet/lost"], m["fleet/restarts"]) == (2.0, 0.0, 0.0)

    def test_every_group_was_consumed_once_and_both_actors_worked(self, run: tuple[str, Path]) -> None:
        rows = [row for batch in batch_rows(run[1]) for row in batch]
        samples = [row for row in rows if row["kind"] == "sample"]
        assert len({row["lease_id"] for row in samples}) == 12 * 8
        assert len(samples) == 12 * 8 * 4
        assert len(rows) - len(samples) == 12 * 4
        assert {row["actor"] for row in samples} == {"rollout-0", "rollout-1"}

    def test_the_run_leaves_a_report_evaluations_and_a_model(self, run: tuple[str, Path]) -> None:
        output, place = run
        assert output.rstrip().endswith(f"report: {place / 'report.html'}")
        assert "<svg" in (place / "report.html").read_text()
        before, after = (json.loads((place / "eval" / f"{name}.json").read_text()) for name in ("before", "after"))
        assert (before["step"], after["step"]) == (0, 12)
        assert len(after["samples"]) == 4
        assert len(after["expert_token_logprobs"]) == sum(after["expert_lengths"]) > 0
        assert (place / "model" / "model.safetensors").stat().st_size > 100_000
        assert any((place / "tensorboard").iterdir())

    def test_the_user_saw_progress(self, run: tuple[str, Path]) -> None:
        for text in ("engine and learner agree", "step 1/12", "step 12/12", "held-out pass rate after training"):
            assert text in run[0]


def test_sft_then_grpo_until_a_loss_that_is_not_finite_ends_the_run_before_the_step(folder: Path, tiny: Path) -> None:
    """A method is a file of values; this one goes from demonstrations alone to rollouts alone by a hard switch."""
    config = toy_config(
        folder / "huge",
        tiny,
        run={"name": "huge", "steps": 10, "checkpoint_every": 0},
        reward={"functions": [{"name": "helpers_toy:many_e_or_too_much"}]},
        queue={"on_equal_rewards": "resample", "max_resamples": 1},
        evaluation={"prompts": 0},
    )
    method = str(ROOT / "configs" / "methods" / "sft_then_grpo.yaml")
    process = start(
        config, "-m", method, "objective.demonstration.weight.steps=2", "objective.preference.advantage_std=false"
    )
    output, _ = process.communicate(timeout=300)
    place = folder / "huge" / "runs" / "huge"
    assert process.returncode == 2, output[-4000:]
    assert "Traceback" not in output
    metrics, kinds = read_metrics(place), [{row["kind"] for row in batch} for batch in batch_rows(place)]
    made = len(metrics)
    assert made > 2
    assert kinds == [{"demonstration"}] * 2 + [{"sample"}] * (made - 2)
    assert [m["weight/demonstration"] for m in metrics] == [1.0] * 2 + [0.0] * (made - 2)
    assert [m["weight/preference"] for m in metrics] == [0.0] * 2 + [1.0] * (made - 2)
    assert metrics[-1]["queue/kept_equal"] <= metrics[-1]["queue/resampled"], "kept only after the one resampling"

    failed = place / "failed" / f"step-{made:05d}.arrow"
    line = output.rstrip().splitlines()[-1]
    assert re.fullmatch(
        rf"step {made + 1}: the loss is not finite; samples: toy-7/\d(, toy-7/\d)*; the batch is in {failed}", line
    )
    rows = pa.ipc.open_file(failed).read_all().to_pylist()
    rewards = [row["reward"] for row in rows if row["prompt_id"] == "toy-7" and row["kind"] == "sample"]
    assert len(rewards) == 4
    assert max(rewards) > 1e40
    assert "<svg" in (place / "report.html").read_text()


def test_sft_starts_no_engine_and_sigterm_saves_the_step_under_way(folder: Path, tiny: Path) -> None:
    config = toy_config(
        folder / "sft", tiny, run={"name": "sft", "steps": 200, "checkpoint_every": 100, "grace_seconds": 60}
    )
    method = ("-m", str(ROOT / "configs" / "methods" / "sft.yaml"))
    status, rest = signalled(config, "step 3/", signal.SIGTERM, *method)
    assert status == 0
    assert rest.rstrip().endswith("ended by SIGTERM; `--resume` goes on from the newest checkpoint")
    place = folder / "sft" / "runs" / "sft"
    [saved] = (place / "checkpoints").iterdir()
    made = int(saved.name.removeprefix("step-"))
    assert [m["step"] for m in read_metrics(place)] == list(range(1, made + 1)), "with the step under way"
    assert 3 <= made < 100

    output = train(config, *method, f"run.steps={made + 2}", "--resume")
    assert "no rollout engine" in output
    metrics = read_metrics(place)
    assert [m["step"] for m in metrics] == list(range(1, made + 3))
    assert metrics[-1]["expert/nll"] < metrics[0]["expert/nll"]
    assert not any(key.startswith(("reward/", "loss/preference")) for m in metrics for key in m)
