"""A run's folder: checkpoints are whole or passed over, batches are kept as consumed."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from cluster.run_folder import MANIFEST, installed_versions, newest_checkpoint, open_run, save_batch, save_checkpoint
from uniapl.config import Config, load_config
from uniapl.config_errors import ConfigError
from uniapl.records import BATCH_SCHEMA, Demonstration, MixedBatch


def config(folder: Path, name: str = "a") -> Config:
    return Config.model_validate(
        {
            "run": {"name": name, "folder": str(folder)},
            "model": {"path": "m"},
            "data": {"train": ["t"], "heldout": ["h"]},
        }
    )


def checkpoint(run: Path, step: int, keep_last: int = 9) -> Path:
    def write(place: Path) -> None:
        (place / "zero").mkdir()
        (place / "zero" / "state.bin").write_bytes(bytes([step]) * 1000)
        (place / "queue.json").write_text("{}")

    return save_checkpoint(run, step, keep_last, write)


def test_a_new_run_has_its_configuration_and_versions(tmp_path: Path) -> None:
    run = open_run(config(tmp_path), resume=False)
    assert load_config(run / "config.yaml") == config(tmp_path)
    assert installed_versions().keys() >= {"torch", "ray", "deepspeed", "transformers", "pyarrow"}


def test_an_existing_run_wants_resume_or_another_name(tmp_path: Path) -> None:
    open_run(config(tmp_path), resume=False)
    with pytest.raises(ConfigError) as error:
        open_run(config(tmp_path), resume=False)
    assert str(error.value) == (
        f"run.name: {tmp_path / 'a'} is there already; allowed: another name, or --resume to go on"
    )
    assert open_run(config(tmp_path), resume=True) == tmp_path / "a"


def test_the_newest_checkpoint_is_found_and_old_ones_go(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (2, 4, 10):
        checkpoint(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00004", "step-00010"]
    assert newest_checkpoint(tmp_path) == (10, tmp_path / "checkpoints" / "step-00010")


def tampered(place: Path) -> None:
    (place / "zero" / "state.bin").write_bytes(b"\0" * 1000)


def truncated(place: Path) -> None:
    (place / "zero" / "state.bin").write_bytes(b"\4" * 10)


def incomplete(place: Path) -> None:
    (place / "zero" / "state.bin").unlink()


def without_manifest(place: Path) -> None:
    (place / MANIFEST).unlink()


def with_a_torn_manifest(place: Path) -> None:
    (place / MANIFEST).write_text('{"files": {"zero')


@pytest.mark.parametrize("damage", [tampered, truncated, incomplete, without_manifest, with_a_torn_manifest])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, damage: object) -> None:
    good, bad = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    damage(bad)  # type: ignore[operator]
    with pytest.warns(UserWarning, match="step-00004: .*; an older checkpoint is used"):
        assert newest_checkpoint(tmp_path) == (2, good)


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)

    def fail(place: Path) -> None:
        (place / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 4, 9, fail)
    found = newest_checkpoint(tmp_path)
    assert found is not None and found[0] == 2
    checkpoint(tmp_path, 4)
    found = newest_checkpoint(tmp_path)
    assert found is not None and found[0] == 4


def test_batches_are_kept_whole(tmp_path: Path) -> None:
    run = open_run(config(tmp_path), resume=False)
    save_batch(run, MixedBatch(3, [], [Demonstration("d", [1], [2])]))
    assert [p.name for p in (run / "batches").iterdir()] == ["step-00003.arrow"]
    table = pa.ipc.open_file(run / "batches" / "step-00003.arrow").read_all()
    assert table.schema == BATCH_SCHEMA
    assert table.num_rows == 1
