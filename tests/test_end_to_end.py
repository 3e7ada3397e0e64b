"""The command line as a user runs it: real Ray, vLLM, ZeRO-3, Serve and Arrow files on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pytest
import torch
from helpers_cli import (
    assert_memory_freed,
    batch_rows,
    environment,
    killed,
    session_members,
    shared_memory,
    start,
    train,
)
from helpers_exact import differences
from helpers_import import import_toy, rows_of
from helpers_outside import SECRETS, files_with, listening, ray_session
from helpers_replay import uniapl_replay
from helpers_toy import toy_config
from killed_train import UNDER_WAY
from transformers import AutoModelForCausalLM

from cluster.cli import main
from uniapl.analysis import Evaluation
from uniapl.config import load_config
from uniapl.data.comparisons import ComparisonReader
from uniapl.data.sources import heldout_prompts
from uniapl.runlog import METRICS_FILE, read_metrics

pytestmark = pytest.mark.timeout(1200)  # a fixture is up to two whole runs
PARTS = ("generate", "score", "wait", "train", "broadcast", "other")
PROCESSES = ("RolloutActor", "EngineCore", "LearnerRank", "QueueActor", "ServeReplica", "ServeController", "raylet")
STEPS = 12
SECRET = "planted-secret-of-the-environment"
OBJECTIVE = {
    "preference": {"weight": 0.5},
    "demonstration": {"weight": {"kind": "lagrangian", "value": 0.5, "target": 2.0, "rate": 0.1}},
    "adversarial": {
        "weight": 0.2,
        "discriminator": "cotrained",
        "cotrained": {"warmup_steps": 1, "learning_rate": 1e-3},
    },
    "kl": {"weight": 0.1},
}
"""Everything that a checkpoint must hold or leave alone: a weight that follows the expert's NLL, a cotrained
discriminator, a frozen reference."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@dataclass
class Whole:
    """A run, and what was seen of it from outside in its second step."""

    config: Path
    folder: Path
    output: str
    listening: dict[str, set[str]]
    ray_folder: Path
    token: str
    command_lines: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def whole(folder: Path, tiny: Path) -> Whole:
    """Two rollout actors, two learner ranks, all terms, on data that `uniapl data import` made of a user's files."""
    words = import_toy(folder / "whole")
    config = toy_config(
        folder / "whole",
        tiny,
        run={"name": "whole", "steps": STEPS, "checkpoint_every": 4, "keep_last": 3},
        rollout={"actors": 2, "groups_in_flight": 4},
        learner={"ranks": 2},
        objective=OBJECTIVE,
        logging={"trackio": {"project": "toys"}},
    )
    before = shared_memory()
    with pytest.MonkeyPatch.context() as patch:
        for name in SECRETS:
            patch.setenv(name, SECRET)
        process = start(config, *words)
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if "step 2/" in line:
            break
    members = list(session_members(process.pid).values())
    run = folder / "whole" / "runs" / "whole"
    seen = Whole(run / "config.yaml", run, "", listening(process.pid), *ray_session(process.pid), members)
    rest, _ = process.communicate(timeout=540)
    seen.output = output + rest
    assert process.returncode == 0, seen.output[-4000:]
    assert_memory_freed(before)
    return seen


class TestWholeSystem:
    def test_the_reward_of_a_learnable_task_rises(self, whole: Whole) -> None:
        rewards = [m["reward/mean"] for m in read_metrics(whole.folder)]
        assert len(rewards) == 12
        assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2

    def test_the_expert_becomes_likelier(self, whole: Whole) -> None:
        nll = [m["expert/nll"] for m in read_metrics(whole.folder)]
        assert nll[-1] < 0.7 * nll[0]

    def test_every_term_is_in_every_step(self, whole: Whole) -> None:
        for m in read_metrics(whole.folder):
            assert {"loss/preference", "loss/demonstration"} <= m.keys()
            assert ("loss/adversarial" in m) == (m["step"] > 1), "not while the discriminator warms up"
            assert sum(value for key, value in m.items() if key.startswith("share/")) == pytest.approx(1.0)
            assert ("gradient/norm_preference" in m) == ("entropy/exact" in m) == (m["step"] in (1, 11))
            assert m["importance/min"] <= m["importance/p50"] <= m["importance/max"]
            assert m["staleness/max"] == 0.0
            assert m["kl/behaviour"] < 1e-6, "engine and learner hold the same weights at every step"

    def test_the_weights_moved_and_the_policy_left_the_reference(self, whole: Whole) -> None:
        metrics = read_metrics(whole.folder)
        assert {m["weight/preference"] for m in metrics} == {0.5}
        assert len({m["weight/demonstration"] for m in metrics}) == STEPS
        assert [m["weight/adversarial"] for m in metrics] == [0.0, *[0.2] * (STEPS - 1)]
        assert metrics[0]["kl/reference"] == pytest.approx(0.0, abs=1e-6)
        assert metrics[-1]["kl/reference"] > 1e-4

    def test_the_batches_kept_hold_the_discriminators_scores(self, whole: Whole) -> None:
        rows = pa.ipc.open_file(whole.folder / "batches" / "step-00003.arrow").read_all().to_pylist()
        paired = [row["expert_score"] for row in rows if row["kind"] == "sample" and row["expert_score"] is not None]
        mean = read_metrics(whole.folder)[3]["discriminator/sample_mean"]
        assert sum(paired) / len(paired) == pytest.approx(mean)

    def test_the_times_of_a_step_add_up(self, whole: Whole) -> None:
        for m in read_metrics(whole.folder):
            assert all(m[f"time/{part}"] >= 0 for part in PARTS)
            assert (m["fleet/members"], m["fleet/lost"], m["fleet/restarts"]) == (2.0, 0.0, 0.0)

        unexplained = median(m["time/other"] / m["time/step"] for m in read_metrics(whole.folder))
        assert unexplained <= 0.05, "of a step of about a second: any one may wait for the processor"

    def test_every_group_was_consumed_once_and_both_actors_worked(self, whole: Whole) -> None:
        rows = [row for batch in batch_rows(whole.folder) for row in batch]
        samples = [row for row in rows if row["kind"] == "sample"]
        assert len({row["lease_id"] for row in samples}) == STEPS * 8
        assert len(samples) == STEPS * 8 * 4
        assert len(rows) - len(samples) == STEPS * 4
        assert {row["actor"] for row in samples} == {"rollout-0", "rollout-1"}

    def test_the_imported_rows_are_what_is_trained_on(self, whole: Whole) -> None:
        data = load_config(whole.config).data
        imported = {row.id: row for row in rows_of(*data.train)}
        trained = {(row["kind"], row["prompt_id"]) for batch in batch_rows(whole.folder) for row in batch}
        experts = {name for name, row in imported.items() if row.response}
        assert {name for kind, name in trained if kind == "demonstration"} <= experts
        assert {name for kind, name in trained if kind == "sample"} == imported.keys(), "more than an epoch of prompts"
        assert len(imported) > len(experts) > 0
        evaluated = {s.prompt_id for s in Evaluation.load(whole.folder / "eval" / "after.json").samples}
        assert evaluated <= {row.id for row in rows_of(*data.heldout)}

    def test_the_imported_pairs_are_what_the_discriminator_warms_up_with(self, whole: Whole) -> None:
        first, *others = read_metrics(whole.folder)
        assert first["discriminator/comparisons"] == 8 * 4, "as many as the batch has samples"
        assert first["discriminator/comparison_loss"] > 0
        assert not any("discriminator/comparisons" in m for m in others)
        [pairs] = load_config(whole.config).objective.adversarial.cotrained.comparisons
        assert {pair.chosen for pair in ComparisonReader([pairs])} == {"eeeee eeeee"}

    def test_trackio_has_the_metrics_of_every_step(self, whole: Whole) -> None:
        with sqlite3.connect(whole.folder / "trackio" / "toys.db") as database:
            rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
        assert [row[:2] for row in rows] == [("whole", step) for step in range(1, STEPS + 1)]
        for (_, _, text), m in zip(rows, read_metrics(whole.folder), strict=True):
            assert json.loads(text) == {key: value for key, value in m.items() if key not in ("step", "time")}

    def test_the_run_leaves_a_report_evaluations_and_a_model(self, whole: Whole) -> None:
        output, place = whole.output, whole.folder
        assert output.rstrip().endswith(f"report: {place / 'report.html'}")
        assert "<svg" in (place / "report.html").read_text()
        before, after = (json.loads((place / "eval" / f"{name}.json").read_text()) for name in ("before", "after"))
        assert (before["step"], after["step"]) == (0, 12)
        assert len(after["samples"]) == 4
        assert len(after["expert_token_logprobs"]) == sum(after["expert_lengths"]) > 0
        assert (place / "model" / "model.safetensors").stat().st_size > 100_000
        assert any((place / "tensorboard").iterdir())

    def test_the_user_saw_progress(self, whole: Whole) -> None:
        for text in ("engine and learner agree", "step 1/12", "step 12/12", "held-out pass rate after training"):
            assert text in whole.output

    def test_every_process_of_the_run_listens_on_loopback_alone(self, whole: Whole) -> None:
        names = " ".join(whole.listening)
        assert [part for part in PROCESSES if part not in names] == []
        assert set().union(*whole.listening.values()) == {"127.0.0.1"}, whole.listening

    def test_neither_the_token_nor_a_secret_of_the_environment_is_written_anywhere(self, whole: Whole) -> None:
        secrets = (SECRET, whole.token)
        assert files_with(whole.folder, *secrets) + files_with(whole.ray_folder, *secrets) == []
        told = whole.output + " ".join(whole.command_lines)
        assert not [secret for secret in secrets if secret in told]


class TestResume:
    """Goes on from the checkpoint of step 4 after its driver was killed in step 6, and evaluates every 3 steps."""

    @pytest.fixture(scope="class")
    def resumed(self, whole: Whole) -> tuple[str, Path]:
        run, name = whole.folder.with_name("resumed"), "run.name=resumed"
        *_, line = killed(whole.config, "step:6:0.01", name)
        assert line == UNDER_WAY
        assert [m["step"] for m in read_metrics(run)] == [1, 2, 3, 4, 5]
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00004"]
        damage(run, whole.folder / "checkpoints")
        refused = start(whole.config, name).communicate(timeout=540)[0]
        return refused + train(whole.config, name, "evaluation.every=3", "--resume"), run

    def test_every_bit_is_that_of_the_undisturbed_run(self, resumed: tuple[str, Path], whole: Whole) -> None:
        """Token ids, log-probabilities, rewards, scores, losses, weights."""
        assert differences(resumed[1], whole.folder, STEPS) == []

    def test_evaluations_beside_training_are_of_one_version_and_change_nothing(
        self, resumed: tuple[str, Path], whole: Whole
    ) -> None:
        """The undisturbed run, bit for bit the same (above), made none."""
        assert not list((whole.folder / "eval").glob("step-*"))
        found = {path.stem: Evaluation.load(path) for path in sorted((resumed[1] / "eval").glob("step-*.json"))}
        assert list(found) == ["step-00006", "step-00009"]
        assert [(e.step, e.versions, len(e.samples)) for e in found.values()] == [(6, [6], 4), (9, [9], 4)]
        metrics = read_metrics(resumed[1])
        assert ["time/evaluate" in m for m in metrics] == [False] * 4 + [True] * (STEPS - 4), "of the steps made again"
        told = {m["eval/step"]: m for m in metrics if "eval/step" in m}
        assert {step: m["step"] for step, m in told.items()} == {6.0: 7, 9.0: 10}
        for step, m in told.items():
            rate = found[f"step-{step:05.0f}"].pass_rate
            assert rate is not None
            assert (m["eval/pass_rate"], m["eval/low"], m["eval/high"]) == (rate.value, rate.low, rate.high)
            assert f"held-out pass rate after step {step:.0f}: {rate.value:.1%}" in resumed[0]

    def test_a_damaged_checkpoint_is_named_and_none_is_left(self, resumed: tuple[str, Path]) -> None:
        assert "step-00012: queue.json is not what was written; an older checkpoint is used" in resumed[0]
        left = sorted(path.name for path in (resumed[1] / "checkpoints").iterdir())
        assert left == ["step-00004", "step-00008", "step-00012"]

    def test_a_second_run_of_the_same_name_is_refused(self, resumed: tuple[str, Path]) -> None:
        assert f"run.name: {resumed[1]} is there already; allowed: another name, or --resume to go on" in resumed[0]


def damage(run: Path, checkpoints: Path) -> None:
    """What other ends leave: a checkpoint that was not finished, one that is damaged, a line of the metrics that was
    not finished, and an evaluation of a step that is made again."""
    shutil.copytree(checkpoints / "step-00008", run / "checkpoints" / "step-00008.partial")
    shutil.copytree(checkpoints / "step-00012", run / "checkpoints" / "step-00012")
    (run / "checkpoints" / "step-00012" / "queue.json").write_text("{}")
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "loss/to')
    (run / "eval" / "step-00006.json").write_text("of a step that is made again")


class TestReplay:
    """One rank, without Ray, makes steps again that two ranks made."""

    def test_a_step_between_two_checkpoints_is_reproduced_and_compared_with_another_value(self, whole: Whole) -> None:
        status, out = uniapl_replay(whole.folder, "7", "objective.kl.weight=0.3", "--json")
        found = json.loads(out)
        assert (status, found["reproduced"]) == (0, True)
        logged = read_metrics(whole.folder)[6]
        for key in ("loss/total", "loss/adversarial", "loss/kl", "learner/grad_norm", "discriminator/loss"):
            assert found["recorded"][key] == logged[key]
            assert found["replayed"][key] == pytest.approx(logged[key], rel=1e-5, abs=1e-5)
        added = found["changed"]["loss/total"] - found["replayed"]["loss/total"]
        assert added == pytest.approx(0.2 * logged["loss/kl"], rel=1e-4)
        assert found["changed"]["loss/kl"] == found["replayed"]["loss/kl"], "from the same weights"


class TestAfterwards:
    """What `uniapl export` and `uniapl eval` make of the run, against what the learner said of its own weights."""

    @pytest.fixture(scope="class")
    def exported(self, whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
        """By step; two ranks saved them, and the newest is in the default place."""
        out = tmp_path_factory.mktemp("exported") / "of-step-8"
        assert main(["export", str(whole.folder)]) == 0
        assert main(["export", str(whole.folder), "--step", "8", "--out", str(out)]) == 0
        return {12: whole.folder / "export" / "step-00012", 8: out}

    def test_the_newest_checkpoint_gives_what_the_run_wrote_at_its_end(self, whole: Whole, exported: Any) -> None:
        """Bit for bit, but for the time of day."""
        names = sorted(path.name for path in exported[12].iterdir())
        assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {*names}
        assert names == sorted(path.name for path in (whole.folder / "model").iterdir())
        for name in names:
            assert (exported[12] / name).read_bytes() == (whole.folder / "model" / name).read_bytes(), name

    def test_transformers_gives_the_learners_logprobs(self, whole: Whole, exported: Any) -> None:
        """Of the experts' tokens, as the learner weighed them after the last step."""
        after = Evaluation.load(whole.folder / "eval" / "after.json")
        prompts = heldout_prompts(load_config(whole.config), 4)
        pairs = [(prompt.token_ids, prompt.expert_ids) for prompt in prompts if prompt.expert_ids]
        found = hf_logprobs(exported[12], pairs)
        assert found == pytest.approx(after.expert_token_logprobs, abs=1e-5)
        assert hf_logprobs(exported[8], pairs) != pytest.approx(after.expert_token_logprobs, abs=1e-2)

    def test_an_earlier_checkpoint_gives_the_logprobs_that_its_weights_sampled_with(
        self, whole: Whole, exported: Any
    ) -> None:
        rows = [row for row in batch_rows(whole.folder)[8] if row["kind"] == "sample"]
        found = hf_logprobs(exported[8], [(row["prompt_ids"], row["response_ids"]) for row in rows])
        assert found == pytest.approx([value for row in rows for value in row["logprobs"]], abs=1e-4)

    def test_eval_gives_the_responses_scores_and_logprobs_of_the_runs_own_evaluation(self, whole: Whole) -> None:
        """Greedy, in float32, by another engine from the exported folder; the log-probabilities are the learner's."""
        command = [sys.executable, "-m", "cluster.cli", "eval", str(whole.folder), "--suite", "heldout", "--limit", "4"]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment(), timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        after = Evaluation.load(whole.folder / "eval" / "after.json")
        assert json.loads(done.stdout)["scores"]["pass"] == dataclasses.asdict(after.pass_rate)
        kept = json.loads((whole.folder / "eval" / "heldout-greedy.json").read_text())
        assert kept["settings"]["max_tokens"] == 12
        for row, sample in zip(kept["responses"], after.samples, strict=True):
            [found] = row["responses"]
            assert (row["id"], found["text"], found["tokens"]) == (sample.prompt_id, sample.response, sample.tokens)
            assert found.get("reward", 0.0) == sample.reward
            assert found["logprob"] == pytest.approx(sum(sample.token_logprobs), abs=1e-4 * sample.tokens)


def hf_logprobs(folder: Path, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """Log-probabilities that transformers' model gives the tokens of responses to prompts, all in a row."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: list[float] = []
    for prompt, response in pairs:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        found += logits.log_softmax(-1)[range(len(response)), response].tolist()
    return found
