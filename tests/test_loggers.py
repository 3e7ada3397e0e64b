"""W&B, MLflow and trackio: their own clients, offline, read back from the files that they leave."""

from __future__ import annotations

import json
import sqlite3
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers_outside import SECRETS, files_with

from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.loggers import Guarded, open_loggers
from uniapl.loggers.to_wandb import API_KEY
from uniapl.runlog import RunLog, read_metrics

ALL: dict[str, Any] = {"tensorboard": False, "wandb": {"project": "p"}, "mlflow": {}, "trackio": {"project": "t"}}
SECRET = "planted0secret0" * 3
"""Of the length that W&B wants a key to have."""
LOGGED = {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
"""Steps 1 to 3, then from a checkpoint after step 2 on, 3 and 4."""


def config(logging: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "mine"},
            "model": {"path": "m"},
            "data": {"train": ["x"]},
            "evaluation": {"prompts": 0},
            "logging": logging,
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was resumed."""
    folder = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a logger that failed would say so
        for name in SECRETS:
            patch.setenv(name, SECRET)
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        for resume, steps in ((False, (1, 2, 3)), (True, (3, 4))):
            log = RunLog(folder, False, open_loggers(config(ALL), folder, resume))
            if resume:
                log.truncate_after(2)
            for step in steps:
                log.log(step, {"loss/total": LOGGED[step], "reward/mean": 1.0})
            log.close(failed=not resume)
    return folder


def test_mlflow_goes_on_with_the_same_run(run: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((run / "mlflow").as_uri())
    [found] = client.search_runs([client.get_experiment_by_name("uniapl").experiment_id])
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    assert found.data.params["learner.ranks"] == "1"
    history = client.get_metric_history(found.info.run_id, "loss/total")
    assert [(m.step, m.value) for m in history] == [(s, LOGGED[s]) for s in (1, 2, 3, 3, 4)]
    assert history[-1].timestamp == int(read_metrics(run)[-1]["time"] * 1000)


def test_wandb_leaves_two_sessions_of_one_run_to_sync(run: Path) -> None:
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "the id"
    found = [[entry for entry in map(_history, _wandb_records(file)) if entry] for file in files]
    assert [[(e["step"], e["loss/total"]) for e in session] for session in found] == [
        [(s, LOGGED[s]) for s in (1, 2, 3)],
        [(s, LOGGED[s]) for s in (3, 4)],
    ]
    begun = next(record.run for record in _wandb_records(files[0]) if record.WhichOneof("record_type") == "run")
    assert (begun.project, begun.display_name) == ("p", "mine")
    assert "learner" in {item.key for item in begun.config.update}


def test_trackio_goes_on_with_the_same_run(run: Path) -> None:
    with sqlite3.connect(run / "trackio" / "t.db") as database:
        rows = database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert len({row[0] for row in rows}) == 1
    assert {row[1] for row in rows} == {"mine"}
    assert [(row[2], json.loads(row[3])["loss/total"]) for row in rows] == [(s, LOGGED[s]) for s in (1, 2, 3, 3, 4)]


def test_keys_and_passwords_of_the_environment_are_in_none_of_the_files_that_clients_leave(run: Path) -> None:
    assert files_with(run, SECRET) == []


def _history(record: Any) -> dict[str, float]:
    return {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}


def _wandb_records(path: Path) -> list[Any]:
    """What stands in a .wandb file: a header, then LevelDB's log format, blocks of 32 KiB, of W&B's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(whole))
            whole = b""
    return found


class Broken:
    """A service that takes nothing while `broken`. A stand-in: real ones cannot be told when to fail and to recover."""

    def __init__(self) -> None:
        self.broken = True
        self.got: list[float] = []

    def log(self, records: list[Any]) -> None:
        if self.broken:
            raise ConnectionError("https://me:secret@server is gone\nfor now")
        self.got += [record["step"] for record in records]

    def close(self, failed: bool) -> None:
        self.got.append(-1)


def test_a_service_that_fails_later_is_told_of_once_and_gets_all_when_it_is_back(tmp_path: Path) -> None:
    service = Broken()
    log = RunLog(tmp_path, False, [Guarded("wandb", service, retry_s=0.0)])
    with pytest.warns(UserWarning) as told:
        for step in (1, 2):
            log.log(step, {"a": 1.0})
    said = "logging.wandb: ConnectionError: https://***@server is gone for now; tried again every minute; "
    assert [str(w.message) for w in told] == [said + "metrics.jsonl has all steps"]
    service.broken = False
    log.log(3, {"a": 1.0})
    log.close()
    log.close()
    assert service.got == [1, 2, 3, -1]
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_service_that_is_down_is_not_asked_at_every_step(tmp_path: Path) -> None:
    service = Broken()
    guarded = Guarded("mlflow", service, retry_s=1000.0)
    with pytest.warns(UserWarning):
        guarded.log({"step": 1})
    service.broken = False
    guarded.log({"step": 2})
    assert service.got == []
    guarded.close(failed=False)
    assert service.got == [1, 2, -1]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"wandb": {"mode": "online"}}, f"logging.wandb.mode: got 'online'; allowed: with a key in the .*: {API_KEY}"),
        ({"mlflow": {"tracking_uri": "http://127.0.0.1:9"}}, "logging.mlflow: did not start: .*; allowed: null, "),
        ({"mlflow": {"tracking_uri": "nonsense://x"}}, "logging.mlflow: did not start: .*; allowed: null, "),
    ],
)
def test_one_that_cannot_start_is_one_line(
    tmp_path: Path, section: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=message) as error:
        open_loggers(config(section), tmp_path, resume=False)
    assert "\n" not in str(error.value)


def test_a_client_that_is_not_installed_is_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"allowed: null, or after `pip install 'uniapl\[trackio\]'`"):
        open_loggers(config({"trackio": {}}), tmp_path, resume=False)


def test_a_password_in_the_address_is_refused_before_it_is_written_anywhere() -> None:
    with pytest.raises(ValueError, match=r"tracking_uri: got 'https://\*\*\*@x'; allowed: no user and password"):
        config({"mlflow": {"tracking_uri": "https://me:hunter2@x"}})
