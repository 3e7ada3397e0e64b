"""A run in two lives by methods that come with the project; the second is debugged, until a loss is not finite."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest
from helpers_cli import ROOT, batch_rows, signalled, start
from helpers_replay import uniapl_replay
from helpers_toy import toy_config
from ray.runtime_env.runtime_env import _merge_runtime_env

from cluster import debug
from uniapl.runlog import read_metrics

pytestmark = pytest.mark.timeout(1200)  # two whole runs
PARTS = ("RolloutActor", "LearnerRank", "ServeReplica")


def test_what_a_job_sets_for_its_workers_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses a variable that both a job and its driver set."""
    own = {"env_vars": {"RAY_DEDUP_LOGS": "1", "MINE": "2"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": own}))
    for name, value in (debug.ENVIRONMENT | own["env_vars"]).items():
        monkeypatch.setenv(name, value)
    debug.prepare()
    assert _merge_runtime_env(own, debug.of_workers()) == {"env_vars": debug.ENVIRONMENT | own["env_vars"]}


def test_sft_until_sigterm_then_grpo_until_a_loss_that_is_not_finite(tmp_path: Path, tiny: Path) -> None:
    """SFT starts no engine, and SIGTERM saves its step under way; the run goes on with a method that does two steps of
    demonstrations alone and then rollouts alone, by a hard switch, until a loss ends it before the step."""
    config = toy_config(
        tmp_path,
        tiny,
        run={"name": "two", "steps": 200, "checkpoint_every": 100, "grace_seconds": 60},
        reward={"functions": [{"name": "helpers_toy:many_e_or_too_much_stopping"}]},
        rollout={"colocate": True},
        queue={"on_equal_rewards": "resample", "max_resamples": 1},
        evaluation={"prompts": 0},
    )
    methods, place = ROOT / "configs" / "methods", tmp_path / "runs" / "two"
    status, output = signalled(config, "step 3/", signal.SIGTERM, "-m", str(methods / "sft.yaml"), within_s=60)
    assert status == 0
    assert "no rollout engine" in output
    [saved] = (place / "checkpoints").iterdir()
    assert output.rstrip().endswith(f"ended by SIGTERM; --resume goes on from {saved.name}")
    first = int(saved.name.removeprefix("step-"))
    assert [m["step"] for m in read_metrics(place)] == list(range(1, first + 1)), "with the step under way"
    assert 3 <= first < 100

    switch = first + 2
    changes = [f"objective.demonstration.weight.steps={switch}", "objective.preference.advantage_std=false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests" / "breaks"))
        process = start(config, "-m", str(methods / "sft_then_grpo.yaml"), *changes, "--resume", "--debug")
    output, attached = followed(process)
    assert process.returncode == 2, output[-4000:]
    assert "Traceback" not in output
    metrics, kinds = read_metrics(place), [{row["kind"] for row in batch} for batch in batch_rows(place)]
    made = len(metrics)
    assert made > switch
    _is_debugged(place, output, attached)
    assert [m["step"] for m in metrics] == list(range(1, made + 1))
    assert kinds == [{"demonstration"}] * switch + [{"sample"}] * (made - switch)
    assert [m.get("weight/demonstration") for m in metrics] == [1.0] * switch + [0.0] * (made - switch)
    assert [m.get("weight/preference", 0.0) for m in metrics] == [0.0] * switch + [1.0] * (made - switch)
    assert metrics[switch - 1]["expert/nll"] < metrics[0]["expert/nll"]
    assert not any(key.startswith(("reward/", "loss/preference")) for m in metrics[:switch] for key in m)
    assert metrics[-1]["queue/kept_equal"] <= metrics[-1]["queue/resampled"], "kept only after the one resampling"
    _ends_as_not_finite(place, made, output)


def followed(process: subprocess.Popen[str]) -> tuple[str, list[str]]:
    """What a run prints to its end, and what its breakpoints answer. As `ray debug` does, which looks their ports up in
    Ray's store."""
    assert process.stdout is not None
    output, attached = "", []
    for line in process.stdout:
        output += line
        if found := re.search(r"RemotePdb session open at localhost:(\d+)", line):
            with socket.create_connection(("localhost", int(found[1])), timeout=30) as pdb:
                pdb.sendall(b"args\nc\n")
                attached.append(b"".join(iter(lambda: pdb.recv(4096), b"")).decode())
    process.wait(timeout=60)
    return output, attached


def _is_debugged(place: Path, output: str, attached: list[str]) -> None:
    """Every part that a run with rollouts has shows its log, keeps it, and stops at a breakpoint."""
    learner, reward = sorted(attached, key=lambda said: "response = " in said)
    assert "weights = {" in learner
    assert "prompt = Prompt(id='toy-" in reward and "response = '" in reward
    attach = r"debug: a breakpoint\(\) waits for `RAY_DEBUG=legacy .*ray debug --address 127\.0\.0\.1:\d+`"
    assert re.search(attach, output)
    informed = r"INFO \d\d-\d\d \d\d:\d\d:\d\d \[\S+\.py:\d+\]"
    assert re.search(rf"\(RolloutActor pid=\d+\).* {informed}", output), "of vLLM"
    logs = {path.name: path.read_text() for path in (place / "logs").iterdir()}
    kept = {part: "".join(text for name, text in logs.items() if part in name) for part in PARTS}
    assert re.search(informed, kept["RolloutActor"])
    assert "RemotePdb session open" in kept["ServeReplica"] and "RemotePdb session open" in kept["LearnerRank"]


def _ends_as_not_finite(place: Path, made: int, output: str) -> None:
    failed = place / "failed" / f"step-{made:05d}.arrow"
    line = output.rstrip().splitlines()[-1]
    assert re.fullmatch(
        rf"step {made + 1}: the loss is not finite; samples: toy-7/\d(, toy-7/\d)*; the batch is in {failed}; "
        rf"`uniapl replay {place} {made + 1}` makes the step again",
        line,
    )
    status, out = uniapl_replay(place, str(made + 1), "--pdb", typed="p last.batch.step, len(last.batch.groups)\nc\n")
    assert status == 0
    assert f"({made}, 8)" in out, "the debugger stood before the step"
    assert re.search(r"^  toy-7/0  reward \d.*e\+", out, re.MULTILINE)
    assert out.rstrip().endswith(f"step {made + 1}: not finite, as in the run")
    rows = pa.ipc.open_file(failed).read_all().to_pylist()
    rewards = [row["reward"] for row in rows if row["prompt_id"] == "toy-7" and row["kind"] == "sample"]
    assert len(rewards) == 4
    assert max(rewards) > 1e40
    assert "<svg" in (place / "report.html").read_text()
