"""A run that is killed, ended and interrupted again and again gives, bit for bit, what an undisturbed one gives."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers_cli import killed, signalled, start, train
from helpers_exact import differences
from helpers_toy import toy_config

from uniapl.runlog import read_metrics

STEPS = 7
pytestmark = pytest.mark.timeout(1200)  # one fixture is four whole runs
OBJECTIVE = {
    "preference": {"weight": 0.5},
    "demonstration": {"weight": {"kind": "lagrangian", "value": 0.5, "target": 2.0, "rate": 0.1}},
    "adversarial": {
        "weight": 0.2,
        "discriminator": "cotrained",
        "cotrained": {"warmup_steps": 1, "learning_rate": 1e-3},
    },
    "kl": {"weight": 0.1},
    "diagnostics_every": 4,
}
"""Everything that a checkpoint must hold or leave alone: a weight that follows the expert's NLL, a cotrained
discriminator, a frozen reference."""


def config(folder: Path, tiny: Path, name: str) -> Path:
    return toy_config(
        folder / name,
        tiny,
        run={"name": name, "steps": STEPS, "checkpoint_every": 2, "grace_seconds": 120},
        evaluation={"prompts": 0},
        objective=OBJECTIVE,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tiny: Path) -> Path:
    train(config(folder, tiny, "undisturbed"))
    return folder / "undisturbed" / "runs" / "undisturbed"


@pytest.fixture(scope="module")
def disturbed(folder: Path, tiny: Path) -> dict[str, Any]:
    """One run in three lives; what was seen at the end of each."""
    place, seen = config(folder, tiny, "disturbed"), dict[str, Any]()
    run = folder / "disturbed" / "runs" / "disturbed"
    checkpoints = run / "checkpoints"

    killed(place, "broadcast:3:0.005")
    seen["after the broadcast"] = sorted(p.name for p in checkpoints.iterdir()), len(read_metrics(run))
    seen["Ctrl-C"] = signalled(place, "step 5/", signal.SIGINT, "--resume")
    seen["report"] = (run / "report.html").read_text()
    seen["second run"] = start(place).communicate(timeout=60)[0]
    seen["last"] = train(place, "--resume")
    return seen | {"run": run}


class TestOneRunInThreeLives:
    def test_every_bit_is_that_of_the_undisturbed_run(self, disturbed: dict[str, Any], undisturbed: Path) -> None:
        """Token ids, log-probabilities, rewards, scores, losses, weights."""
        assert differences(disturbed["run"], undisturbed, STEPS) == []

    def test_a_kill_in_a_broadcast_leaves_the_checkpoint_before(self, disturbed: dict[str, Any]) -> None:
        assert disturbed["after the broadcast"] == (["step-00002"], 2)

    def test_ctrl_c_leaves_a_folder_that_can_be_read(self, disturbed: dict[str, Any]) -> None:
        assert disturbed["Ctrl-C"][0] == 130
        assert "<svg" in disturbed["report"]

    def test_a_second_run_of_the_same_name_is_refused(self, disturbed: dict[str, Any]) -> None:
        line = disturbed["second run"].strip()
        assert line.endswith("is there already; allowed: another name, or --resume to go on")


def test_the_weights_moved_and_the_policy_left_the_reference(undisturbed: Path) -> None:
    metrics = read_metrics(undisturbed)
    assert len({m["weight/demonstration"] for m in metrics}) == STEPS
    assert [m["weight/adversarial"] for m in metrics] == [0.0, *[0.2] * (STEPS - 1)]
    assert metrics[0]["kl/reference"] == pytest.approx(0.0, abs=1e-6)
    assert metrics[-1]["kl/reference"] > 1e-4


def test_the_batches_kept_hold_the_discriminators_scores(undisturbed: Path) -> None:
    rows = pa.ipc.open_file(undisturbed / "batches" / "step-00003.arrow").read_all().to_pylist()
    paired = [row["expert_score"] for row in rows if row["kind"] == "sample" and row["expert_score"] is not None]
    mean = read_metrics(undisturbed)[3]["discriminator/sample_mean"]
    assert sum(paired) / len(paired) == pytest.approx(mean)
