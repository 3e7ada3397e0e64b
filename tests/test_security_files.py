"""Secrets stay out of what a run writes; what a run reads brings no code, but for what SECURITY.md names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers_redis import free_port

from cluster.run_folder import open_run
from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.config_types import REDIS_PASSWORD
from uniapl.report import write_report
from uniapl.rewards.cache import require_redis
from uniapl.runlog import RunLog

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("uniapl", "actors", "learner", "cluster")
SECRET = "planted-secret-4711"
UNSAFE = re.compile(
    r"weights_only=False|pickle\.loads?\(|np\.load\(|numpy\.load\(|allow_pickle|trust_remote_code=True|\beval\((?!\))"
    r"|\bexec\(|yaml\.load\((?!text, Loader=_StrictLoader\))|shell=True|os\.system"
)
KNOWN = {"actors/packed.py": 1}
"""Uses that SECURITY.md speaks of."""


def test_a_secret_of_the_environment_is_in_no_file_of_a_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(REDIS_PASSWORD, SECRET)
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
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


def test_no_other_loader_runs_code_than_those_that_are_documented():
    found = {
        path.relative_to(ROOT).as_posix(): len(UNSAFE.findall(path.read_text(encoding="utf-8")))
        for part in PARTS
        for path in (ROOT / part).rglob("*.py")
    }
    assert {name: count for name, count in found.items() if count} == KNOWN
