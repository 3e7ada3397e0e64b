"""The command line: quick help, and one line for a user's mistake, before any process starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_toy import toy_config, write_shard

ROOT = Path(__file__).resolve().parent.parent


def uniapl(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["report", "--help"],
        ["data", "--help"],
        ["data", "import", "--help"],
        ["eval", "--help"],
        ["export", "--help"],
    ],
)
def test_help_fits_on_a_screen(arguments: list[str]) -> None:
    done = uniapl(*arguments)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) <= 24


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, cluster.cli; print([m for m in ('torch', 'ray', 'vllm', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=nowhere"], "model.path: got 'nowhere'; allowed: a Hugging Face folder with a config.json"),
        (["data.train=[none-*.arrow]"], "none-*.arrow"),
        (["reward.functions=[{name: no_such}]"], "no_such"),
        (["reward.functions=[{name: 'no_module:f'}]"], "no_module"),
        (["run.steps=0"], "run.steps: got 0; allowed: a whole number > 0"),
        (["learner.lr=1"], "learner.lr: unknown key"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path: Path, tiny: Path, overrides: list[str], message: str) -> None:
    config = toy_config(tmp_path, tiny)
    done = uniapl("train", str(config), *overrides, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "runs").exists(), "nothing may be written"


def test_a_broken_shard_is_named_before_anything_starts(tmp_path: Path, tiny: Path) -> None:
    config = toy_config(tmp_path, tiny)
    shard = tmp_path / "train-0.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    done = uniapl("train", str(config), cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(shard) in done.stderr


def test_report_of_a_folder_that_is_no_run(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.arrow", [])
    done = uniapl("report", str(tmp_path))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_overrides_may_stand_after_options() -> None:
    from cluster.cli import _arguments

    found = _arguments(["train", "c.yaml", "a.b=1", "-m", "sft", "run.steps=2"])
    assert (found.method, found.overrides) == ("sft", ["a.b=1", "run.steps=2"])
