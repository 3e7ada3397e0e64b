"""Object stores: local and in-memory file systems, and S3 by a stand-in; shards, working copies of runs, errors."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import moto.settings
import pytest
from helpers_run import write_run
from helpers_s3 import BUCKET, SECRET, s3
from helpers_toy import toy_config, toy_rows, write_shard

from cluster.checkpoints import MANIFEST, kept, save_checkpoint
from cluster.cli import main
from cluster.resume import checkpoint
from cluster.run_folder import open_run
from cluster.run_store import RunStore, open_store
from cluster.watch import watch
from learner.zero_files import needed
from uniapl import storage
from uniapl.config import Config, load_config
from uniapl.config_errors import ConfigError
from uniapl.data.errors import DataError
from uniapl.data.shards import local_shards, with_local_data
from uniapl.data.sources import heldout_prompts, open_sources
from uniapl.live import LiveTable
from uniapl.objective.controllers import Controllers
from uniapl.runlog import RunError
from uniapl.storage import StorageError, join


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3() as url:
        yield url


@pytest.fixture(params=["file", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, bucket: str) -> str:
    """The URL of a folder that is not there yet, in each kind of store."""
    name = f"{tmp_path.name}-place"
    return {"file": f"file://{tmp_path}/{name}", "memory": f"memory://{name}", "s3": f"{bucket}/{name}"}[request.param]


def test_files_go_there_and_come_back(place: str, tmp_path: Path) -> None:
    big = bytes(range(256)) * (storage.BLOCK // 256 + 1)  # more than one block
    (tmp_path / "big").write_bytes(big)
    (tmp_path / "empty").touch()
    storage.check_writable(place)
    assert storage.find(place) == {}, "nothing is left of the probe, and no folder is an error"
    files = {"a/big": tmp_path / "big", "a/b/empty": tmp_path / "empty", "c.txt": tmp_path / "empty"}
    sent = storage.upload_all(files, place)
    assert sent == {name: storage.fingerprint(path) for name, path in files.items()}
    assert {name: entry.size for name, entry in storage.find(place).items()} == {n: sent[n][0] for n in files}
    assert storage.download_all(list(files), place, tmp_path / "back") == sent
    assert (tmp_path / "back" / "a" / "big").read_bytes() == big
    storage.write(join(place, "c.txt"), b"text")
    assert storage.read(join(place, "c.txt")) == b"text"
    storage.delete(join(place, "not-there"))
    storage.delete_all(join(place, "a"), first="b/empty")
    assert storage.find(place).keys() == {"c.txt"}
    storage.delete_all(place)


def test_globs_mean_what_they_mean_on_a_disk(place: str) -> None:
    for name in (
        "b/train-1.arrow",
        "b/train-0.arrow",
        "b/x/train-2.arrow",
        "b/.train-3.arrow",
        "top.arrow",
        "b/t[1].arrow",
    ):
        storage.write(join(place, name), b"x")

    def found(pattern: str) -> list[str]:
        return [entry.url.removeprefix(f"{place}/") for entry in storage.matches(join(place, pattern))]

    assert found("b/train-*.arrow") == ["b/train-0.arrow", "b/train-1.arrow"]
    assert found("b/train-[01].arrow") == found("b/train-?.arrow") == found("b/train-*.arrow")
    assert found("*/x/*") == ["b/x/train-2.arrow"]
    assert found("**/train-*.arrow") == ["b/train-0.arrow", "b/train-1.arrow", "b/x/train-2.arrow"]
    assert found("top.arrow") == ["top.arrow"]
    assert found("b") == found("nothing*") == found("b/nothing") == []
    storage.delete_all(place)


def test_names_that_lead_elsewhere_are_passed_over(bucket: str) -> None:
    for key in ("odd/../up", "odd//etc/root", "odd/./here", "odd/plain"):
        boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=b"x")
    stored = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix="odd")["Contents"]
    assert len(stored) == 4, "the store takes them"
    assert storage.find(f"{bucket}/odd").keys() == {"plain"}


def line_of(error: pytest.ExceptionInfo[Exception]) -> str:
    line = str(error.value)
    assert "\n" not in line and SECRET not in line and "Request ID" not in line
    return line


def test_what_is_missing_is_one_line_with_the_url(place: str, tmp_path: Path) -> None:
    for call in (storage.read, lambda url: storage.download(url, tmp_path / "x" / "y")):
        with pytest.raises(StorageError) as error:
            call(join(place, "no.txt"))
        assert line_of(error) == f"{place}/no.txt: is not there"
    assert list((tmp_path / "x").iterdir()) == [], "nothing half copied"


def test_a_bucket_that_is_missing_or_closed_is_one_line_with_the_key(
    bucket: str, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path, tiny)
    with pytest.raises(ConfigError) as error:
        open_store(load_config(config, ["run.folder=s3://other/runs"]))
    assert "NO_SUCH_BUCKET" in line_of(error) and line_of(error).startswith("run.folder: s3://other/runs/toy/.uniapl")
    with pytest.raises(DataError) as error:
        local_shards(load_config(config, ["data.train=[s3://other/a.arrow]"]), "train")
    assert line_of(error).startswith("data.train: s3://other/a.arrow: nothing there matches; allowed: ")
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)  # from here on it asks who it is
    with pytest.raises(ConfigError) as error:
        open_store(load_config(config, [f"run.folder={bucket}/runs"]))
    assert line_of(error).startswith(f"run.folder: {bucket}/runs/toy/.uniapl") and "AWS Error" in line_of(error)
    with pytest.raises(DataError) as error:
        local_shards(load_config(config, [f"data.train=[{bucket}/*.arrow]"]), "train")
    assert line_of(error).startswith(f"data.train: {bucket}") and "AWS Error" in line_of(error)


def test_a_store_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "REQUEST_S", 1.0)  # the same bounds, reached in seconds and not in minutes
    monkeypatch.setattr(storage, "TRIES", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(StorageError) as error:
            storage.read("s3://bucket/a")
    assert time.monotonic() - began < 20
    assert line_of(error).startswith("s3://bucket/a: ")


def test_urls_that_cannot_be_meant_are_refused_without_their_secrets(tmp_path: Path, tiny: Path) -> None:
    config = toy_config(tmp_path, tiny)
    with pytest.raises(ConfigError) as error:
        load_config(
            config,
            [
                "run.folder=memory://runs",
                "data.train=['s3://key:hunter2@bucket/a.arrow', 's3:///a', 's3://bucket/../a']",
                "data.heldout=['nosuch://bucket/a.arrow']",
            ],
        )
    lines = str(error.value).splitlines()
    assert "hunter2" not in str(error.value)
    assert [line.split(": got ")[0].removeprefix("override: ") for line in lines] == ["run.folder", *["data.train"] * 3]
    with pytest.raises(DataError) as other:
        local_shards(load_config(config, ["data.heldout=['nosuch://bucket/a.arrow']"]), "heldout")
    assert line_of(other).startswith("data.heldout: nosuch://bucket/a.arrow: ")


def shards_there(place: str, tmp_path: Path, tiny: Path) -> Config:
    """A configuration whose shards are in a store alone."""
    path = toy_config(tmp_path, tiny)
    shards = {path.name: path for path in tmp_path.glob("*.arrow")}
    storage.upload_all(shards, place)
    overrides = [f"data.train=['{place}/train-*.arrow']", f"data.heldout=['{place}/heldout.arrow']"]
    return load_config(path, [*overrides, f"run.scratch={tmp_path / 'scratch'}"])


def test_shards_are_copied_once_and_again_when_either_side_changes(place: str, tmp_path: Path, tiny: Path) -> None:
    there = shards_there(place, tmp_path, tiny)
    here = load_config(tmp_path / "toy.yaml")
    sources, own = open_sources(there), open_sources(here)
    assert [sources[0].next() for _ in range(70)] == [own[0].next() for _ in range(70)]
    assert heldout_prompts(there, 4) == heldout_prompts(here, 4)

    copies = [Path(path) for path in local_shards(there, "train")]
    before = [path.stat().st_ino for path in copies]

    def copied_again() -> list[bool]:
        assert local_shards(there, "train") == [str(path) for path in copies]
        now = [path.stat().st_ino for path in copies]
        fresh, before[:] = [a != b for a, b in zip(before, now, strict=True)], now
        return fresh

    if not place.startswith("memory"):  # which does not tell when a file was changed
        assert copied_again() == [False, False]
    whole = copies[1].read_bytes()
    copies[1].write_bytes(whole[:1000] + b"\0" + whole[1001:])
    assert copied_again()[1] and copies[1].read_bytes() == whole
    storage.upload(write_shard(tmp_path / "other.arrow", toy_rows(500, 40)), join(place, "train-0.arrow"))
    assert copied_again()[0]
    assert with_local_data(there).data.train == [str(path) for path in copies]
    assert open_sources(there)[0].state_dict()["rows"] == 72
    storage.delete_all(place)


def parts_of(url: str) -> dict[str, int]:
    return {name: entry.size for name, entry in storage.find(url).items()}


def run_in(place: str, tmp_path: Path, tiny: Path, **run: object) -> Config:
    keys = {"name": "r", "folder": place, "scratch": str(tmp_path / "scratch")} | run
    return load_config(toy_config(tmp_path / "toy", tiny, run=keys))


def opened(config: Config, resume: bool) -> RunStore:
    store = open_store(config)
    assert store is not None
    open_run(config, resume, store)
    return store


def saved(store: RunStore, config: Config, step: int, notes: list[str]) -> Path:
    """A checkpoint as the driver makes it, of no ranks."""

    def write(folder: Path) -> None:
        (folder / "queue.json").write_text(json.dumps({"step": step}))

    place = save_checkpoint(config.run_dir, step, 9, write)
    store.begin(step, place, [], notes.append)
    store.settle()
    return place


def test_a_scratch_folder_without_room_for_this_machines_ranks_ends_the_run(
    ray_session: Any, tmp_path: Path, bucket: str
) -> None:
    """Before a rank is asked: so their nodes are all that there is of them, and of the model the head of its file."""
    (tmp_path / "huge").mkdir()
    head = json.dumps({"weight": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 1 << 52]}}).encode()
    (tmp_path / "huge" / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    config = run_in(f"{bucket}/no-room", tmp_path, tmp_path / "huge", checkpoint_every=4)
    store, here = opened(config, resume=False), ray_session.get_runtime_context().get_node_id()
    system: Any = SimpleNamespace(config=config, learner=SimpleNamespace(nodes=[here, "another"]))
    with pytest.raises(RunError) as error:
        checkpoint(system, Controllers(config.objective), config.run_dir, 4, LiveTable(8), store=store)
    needed = 1.1 * 16 * 2**50 / 2
    assert line_of(error).startswith(f"checkpoint of step 4: {needed / 2**20:.1f} MiB needed, ")
    assert line_of(error).endswith(f" MiB free in {config.run_dir}; make room: there is no checkpoint to go on from")
    assert list((config.run_dir / "checkpoints").glob("*")) == []


def test_a_run_is_kept_in_the_store_and_goes_on_elsewhere(tmp_path: Path, tiny: Path, bucket: str) -> None:
    """Without learner ranks: what they add is in test_storage_run.py."""
    place = f"{bucket}/kept"
    config, notes = run_in(place, tmp_path, tiny, keep_last=2, keep_every=4), list[str]()
    store = opened(config, resume=False)
    for step in range(1, 8):
        (config.run_dir / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
        saved(store, config, step, notes)
    assert len(notes) == 7 and notes[-1].startswith(f"checkpoint {place}/r/checkpoints/step-00007: ")
    assert {name.split("/")[1] for name in parts_of(f"{place}/r") if name.startswith("checkpoints/")} == {
        "step-00004",
        "step-00006",
        "step-00007",
    }
    with pytest.raises(ConfigError) as error:
        opened(config, resume=False)
    assert str(error.value) == f"run.name: {place}/r is there already; allowed: another name, or --resume to go on"

    torn = f"{place}/r/checkpoints/step-00007/{MANIFEST}"
    storage.write(torn, storage.read(torn)[:50])
    storage.write(f"{place}/r/checkpoints/step-00006/late.bin", b"x")
    elsewhere = run_in(place, tmp_path, tiny, scratch=str(tmp_path / "elsewhere"), keep_last=2)
    with pytest.warns(UserWarning) as changes:
        again = opened(elsewhere, resume=True)
    assert "run.keep_every: 4 before, 0 from here on" in [str(change.message) for change in changes]
    assert kept(elsewhere.run_dir) == "--resume goes on from step-00007", "as far as is known by now"
    assert (elsewhere.run_dir / "metrics.jsonl").read_text() == '{"step": 7}\n'
    with pytest.warns(UserWarning) as warnings:
        found = again.fetch_newest([])
    assert found == (4, elsewhere.run_dir / "checkpoints" / "step-00004", 0)
    assert json.loads((found[1] / "queue.json").read_text()) == {"step": 4}
    told = [str(warning.message) for warning in warnings]
    assert told[0].startswith(f"{place}/r/checkpoints/step-00007: not whole (JSONDecodeError: ")
    assert told[1] == (
        f"{place}/r/checkpoints/step-00006: 'late.bin' was not written by the run; an older checkpoint is used"
    )
    assert kept(elsewhere.run_dir) == "--resume goes on from step-00004"
    with pytest.raises(ConfigError, match=r"run\.seed: got 7; allowed: 0 as in"):
        opened(run_in(place, tmp_path, tiny, seed=7), resume=True)


def test_a_checkpoint_that_does_not_get_there_does_not_count(tmp_path: Path, tiny: Path) -> None:
    place, notes = f"file://{tmp_path}/store", list[str]()
    config = run_in(place, tmp_path, tiny)
    store = opened(config, resume=False)
    assert kept(config.run_dir) == "there is no checkpoint to go on from"
    saved(store, config, 1, notes)
    (tmp_path / "store" / "r" / "checkpoints" / "step-00002").write_text("in the way")
    with pytest.raises(RunError) as error:
        saved(store, config, 2, notes)
    assert line_of(error).startswith(f"a checkpoint could not be sent: {place}/r/checkpoints/step-00002")
    assert line_of(error).endswith("; --resume goes on from step-00001")
    store.raise_failed()  # it was told once


def test_sending_goes_on_beside_the_run_and_is_waited_for_within_a_limit(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, notes = run_in(f"file://{tmp_path}/store", tmp_path, tiny), list[str]()
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"step_timeout_s": 0.2})})
    store, write, go_on = opened(config, resume=False), storage.write, threading.Event()

    def slow(url: str, data: bytes) -> None:
        """In the place of a store that takes its time, which no local one does."""
        go_on.wait(60)
        write(url, data)

    monkeypatch.setattr(storage, "write", slow)
    with pytest.raises(RunError) as error:
        saved(store, config, 1, notes)
    assert str(error.value) == (
        f"a checkpoint was not in file://{tmp_path}/store/r within 0.2 s (cluster.step_timeout_s); "
        "there is no checkpoint to go on from"
    )
    go_on.set()
    while not notes:
        time.sleep(0.01)
    saved(store, config, 2, notes)
    assert kept(config.run_dir) == "--resume goes on from step-00002"


def test_a_scratch_folder_that_is_used_otherwise_is_left_alone(tmp_path: Path, tiny: Path) -> None:
    config = run_in(f"file://{tmp_path}/store", tmp_path, tiny)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"run\.scratch: \S+ is no working copy of a run in a store"):
        opened(config, resume=False)
    assert (config.run_dir / "thesis.txt").is_file()


def test_ranks_fetch_what_they_read() -> None:
    kinds = ("zero/zero_pp_rank_{}_mp_rank_00_model_states.pt", "zero/bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt")
    names = [kind.format(rank) for kind in kinds for rank in range(12)]
    names += ["queue.json", "zero/zero_to_fp32.py"]
    assert needed(names, [1, 11], 12, 12) == [kind.format(rank) for kind in kinds for rank in (1, 11)]
    assert needed(names, [0], 12, 3) == names[:-2], "the state of all ranks"


def test_report_and_table_of_a_run_in_a_store(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "seen", steps=3, planned=3)
    files = {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file()}
    url = f"{bucket}/runs/seen"
    storage.upload_all(files, url)
    assert main(["report", url]) == 0
    assert capsys.readouterr().out == f"report: {url}/report.html\n"
    assert b"<svg" in storage.read(f"{url}/report.html")
    assert watch(url, None, as_json=True) == 0
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [1, 2, 3]
    for command in ("report", "watch"):
        assert main([command, f"{bucket}/runs/none"]) == 2
        assert capsys.readouterr().err.startswith(f"{bucket}/runs/none: holds no config.yaml; allowed: ")
