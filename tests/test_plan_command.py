"""`uniapl plan` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers_cli import environment
from helpers_qwen3 import PARAMETERS, write_config
from helpers_toy import toy_config

from cluster.cli import main

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "qwen3-0.6b.yaml"


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The command in this process: torch and transformers, which it needs, are loaded once."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str | Path) -> Done:
        try:
            status = main(["plan", *map(str, arguments)])
        except SystemExit as error:  # argparse
            status = int(error.code or 0)
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config("qwen3-0.6b", tmp_path_factory.mktemp("qwen3"))


def test_a_recipe_that_fits_is_one_screen_and_status_0(plan: Callable[..., Done], model: Path) -> None:
    rates = ["--generate-tokens-per-s", "40000", "--train-tokens-per-s", "60000", "--bandwidth", "20"]
    done = plan(RECIPE, f"model.path={model}", "--gpus", "8", *rates)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 96
    assert lines[0] == "qwen3-0.6b: 4 learner ranks and 4 engines: 8 GPUs of 80 GiB"
    assert "596,049,920" in done.stdout
    assert "1,192.1 MB" in done.stdout
    assert "bottleneck" in done.stdout
    assert lines[-1] == "everything fits"


def test_what_does_not_fit_is_status_1_and_names_the_key(plan: Callable[..., Done], model: Path) -> None:
    done = plan(RECIPE, f"model.path={model}", "--gpus", "8", "--gpu-memory", "16")
    assert done.returncode == 1
    [said] = " ".join(done.stdout.split()).split("what does not fit: ")[1:]
    assert "a learner rank of 24.6 GiB on a GPU of 16 GiB" in said
    assert "change learner.activation_checkpointing to true" in said


def test_json_holds_every_figure(plan: Callable[..., Done], model: Path) -> None:
    done = plan(RECIPE, f"model.path={model}", "--json", "-m", "sft", "evaluation.prompts=0")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["shape"]["parameters"] == PARAMETERS["qwen3-0.6b"]
    assert sum(part["bytes"] for part in found["learner"]) == found["learner_bytes"]
    assert (found["engine"], found["broadcast_bytes"], found["misfits"]) == (None, 0, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.path=Qwen/Qwen3-0.6B"], "model.path: got 'Qwen/Qwen3-0.6B'; allowed: a Hugging Face folder"),
        (["learner.lr=1"], "learner.lr: unknown key"),
        (["--run", "nowhere"], "--run: got 'nowhere'; allowed: the folder of a run"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    plan: Callable[..., Done], tmp_path: Path, tiny: Path, arguments: list[str], message: str
) -> None:
    done = plan(toy_config(tmp_path, tiny), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    "option", [["--gpus", "-1"], ["--node-gpus", "0"], ["--gpu-memory", "0"], ["--bandwidth", "nan"]]
)
def test_a_wrong_number_is_status_2(plan: Callable[..., Done], option: list[str]) -> None:
    done = plan(RECIPE, *option)
    assert done.returncode == 2
    assert option[0] in done.stderr.splitlines()[-1]


def test_nothing_is_started_and_nothing_heavy_loaded(tmp_path: Path, tiny: Path) -> None:
    code = (
        "import sys, cluster.cli; status = cluster.cli.main(sys.argv[1:]); "
        "print(status, [m for m in ('ray', 'vllm', 'deepspeed') if m in sys.modules])"
    )
    config = toy_config(tmp_path, tiny)
    command = [sys.executable, "-c", code, "plan", str(config), "--gpus", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert not (tmp_path / "runs").exists()
