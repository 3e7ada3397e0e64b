"""Secrets stay out of what a run writes; what a run reads brings no code, but for what SECURITY.md names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_cli import environment
from helpers_outside import SECRETS
from helpers_redis import free_port

from cluster.run_folder import open_run
from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.report import write_report
from uniapl.rewards.cache import require_redis
from uniapl.runlog import RunLog

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("uniapl", "actors", "learner", "cluster", "examples", "benchmarks")
SECRET = "planted-secret-4711"
UNSAFE = re.compile(
    r"weights_only=False|pickle\.loads?\(|np\.load\(|numpy\.load\(|allow_pickle|trust_remote_code=True|\beval\((?!\))"
    r"|\bexec\(|yaml\.load\((?!text, Loader=_StrictLoader\))|shell=True|os\.system|read_pickle\("
    r"|\b(?:import|from) +(?:\w+, *)*(?:pickle|cloudpickle|dill|joblib|marshal|shelve)\b"
)
KNOWN = {"actors/packed.py": 2, "learner/safe_load.py": 1}
"""Uses that SECURITY.md speaks of, and the name of an error."""


def test_a_secret_of_the_environment_is_in_no_file_of_a_run(tmp_path, monkeypatch, capfd):
    for name in (*SECRETS, "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    url = f"redis://me@127.0.0.1:{free_port()}/0"
    tree = {"model": {"path": "m"}, "data": {"train": ["t"], "heldout": ["h"]}, "reward": {"redis_url": url}}
    config = Config.model_validate(tree | {"run": {"folder": str(tmp_path)}})
    folder = open_run(config, resume=False)
    log = RunLog(folder, tensorboard=True)
    log.log(1, {"reward/mean": 0.5})
    log.close()
    with pytest.raises(ConfigError) as error:
        require_redis(url)
    write_report(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "versions.json", "metrics.jsonl", "report.html"} <= {path.name for path in files}
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in str(error.value) and SECRET not in "".join(capfd.readouterr())


def test_a_module_that_lies_in_the_current_folder_by_chance_is_not_run(tmp_path):
    tree = {"model": {"path": "m"}, "data": {"train": ["t"], "heldout": ["h"]}, "run": {"folder": str(tmp_path)}}
    folder = open_run(Config.model_validate(tree), resume=False)
    here = tmp_path / "here"
    here.mkdir()
    for name in ("yaml", "pydantic", "pyarrow", "numpy", "jinja2", "uniapl"):
        (here / f"{name}.py").write_text("open('ran', 'w').close()\nraise ImportError(__file__)\n")
    command = [sys.executable, str(Path(sys.executable).with_name("uniapl")), "report", str(folder)]
    done = subprocess.run(command, cwd=here, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert not (here / "ran").exists()


def test_no_other_loader_runs_code_than_those_that_are_documented():
    found = {
        path.relative_to(ROOT).as_posix(): len(UNSAFE.findall(path.read_text(encoding="utf-8")))
        for part in PARTS
        for path in (ROOT / part).rglob("*.py")
    }
    assert {name: count for name, count in found.items() if count} == KNOWN
