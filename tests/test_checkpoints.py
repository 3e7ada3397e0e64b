"""Checkpoint folders: whole or passed over, never more of them than asked for, never onto a full disk."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import checkpoints
from cluster.checkpoints import (
    MANIFEST,
    installed_versions,
    kept,
    newest_checkpoint,
    other_versions,
    require_space,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parent.parent


def checkpoint(run: Path, step: int, keep_last: int = 9, keep_every: int = 0) -> Path:
    def write(place: Path) -> None:
        (place / "zero").mkdir()
        (place / "zero" / "state.bin").write_bytes(bytes([step]) * 1000)
        (place / "queue.json").write_text("{}")

    return save_checkpoint(run, step, keep_last, write, keep_every)


def test_the_newest_checkpoint_is_found_and_old_ones_go(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (2, 4, 10):
        checkpoint(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00004", "step-00010"]
    assert newest_checkpoint(tmp_path) == (10, tmp_path / "checkpoints" / "step-00010")


def tampered(place: Path) -> None:
    (place / "zero" / "state.bin").write_bytes(b"\0" * 1000)


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)

    def fail(place: Path) -> None:
        (place / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 4, 9, fail)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00002"], "room again"
    found = newest_checkpoint(tmp_path)
    assert found is not None and found[0] == 2
    checkpoint(tmp_path, 4)
    found = newest_checkpoint(tmp_path)
    assert found is not None and found[0] == 4


def test_checkpoints_of_chosen_steps_stay_for_ever(tmp_path: Path) -> None:
    for step in range(1, 12):
        checkpoint(tmp_path, step, keep_last=2, keep_every=4)
    assert names(tmp_path) == ["step-00004", "step-00008", "step-00010", "step-00011"]


def test_a_damaged_later_checkpoint_pushes_out_no_whole_one(tmp_path: Path) -> None:
    """As after a resume from step 2, with a damaged checkpoint of step 9 still there."""
    checkpoint(tmp_path, 2)
    tampered(checkpoint(tmp_path, 9))
    new = checkpoint(tmp_path, 3, keep_last=1)
    with pytest.warns(UserWarning, match="step-00009"):
        assert newest_checkpoint(tmp_path) == (3, new)
    checkpoint(tmp_path, 9, keep_last=1)
    assert names(tmp_path) == ["step-00009"]
    assert newest_checkpoint(tmp_path) == (9, tmp_path / "checkpoints" / "step-00009")


def test_what_a_run_says_that_it_goes_on_from_is_no_torn_checkpoint(tmp_path: Path) -> None:
    assert kept(tmp_path) == "there is no checkpoint to go on from"
    checkpoint(tmp_path, 2)
    (checkpoint(tmp_path, 4) / "queue.json").unlink()
    (checkpoint(tmp_path, 6) / "zero" / "state.bin").write_bytes(b"torn")
    (checkpoint(tmp_path, 8) / MANIFEST).unlink()
    assert kept(tmp_path) == "--resume goes on from step-00002"


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_what_a_killed_run_had_begun_to_write_goes(tmp_path: Path) -> None:
    torn = tmp_path / "checkpoints" / "step-00004.partial"
    torn.mkdir(parents=True)
    (torn / "half").write_bytes(b"x" * 100)
    checkpoint(tmp_path, 2)
    assert names(tmp_path) == ["step-00002"]


def test_other_versions_of_packages_are_one_line(tmp_path: Path) -> None:
    place = checkpoint(tmp_path, 2)
    assert other_versions(place) is None
    tree = json.loads((place / MANIFEST).read_text())
    tree["versions"] |= {"torch": "1.0", "ray": "0.1"}
    (place / MANIFEST).write_text(json.dumps(tree))
    now = installed_versions()
    assert other_versions(place) == (
        f"{place} was written with torch 1.0 (now {now['torch']}), ray 0.1 (now {now['ray']}): "
        "numbers may differ from the run's before"
    )


def test_the_first_checkpoints_size_follows_from_the_model(tmp_path: Path, tiny: Path) -> None:
    from safetensors.torch import load_file

    (tmp_path / "checkpoints").mkdir()
    parameters = sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
    assert checkpoints._parameters(str(tiny)) == parameters
    require_space(tmp_path, 1, [str(tiny)])


SMALL_DISK = """
import os, resource, shutil, sys
from pathlib import Path
from cluster.checkpoints import full_disk_told, newest_checkpoint, require_space, save_checkpoint
from uniapl.runlog import RunError
run = Path(sys.argv[1])
def write(size):
    return lambda place: (place / "state.bin").write_bytes(b"x" * size)
save_checkpoint(run, 1, 9, write(1 << 20))
require_space(run, 2, [])
save_checkpoint(run, 2, 9, write(1 << 20))
try:
    save_checkpoint(run, 3, 9, write(3 << 20))
except OSError as error:
    print("errno", error.errno)
print(newest_checkpoint(run)[0], sorted(p.name for p in (run / "checkpoints").iterdir()))
(run / "other").write_bytes(b"x" * (3 << 19))
try:
    require_space(run, 4, [])
except RunError as error:
    print(error)
(run / "other").unlink()
try:
    with full_disk_told(run):
        (run / "batch").write_bytes(b"x" * (8 << 20))
except RunError as error:
    print(error)
try:
    with full_disk_told(run):
        (run / "missing").read_bytes()
except FileNotFoundError as error:
    print("as it was")
"""


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    """On a real file system of 4 MiB, mounted in a namespace of its own, where the machine lets a user have one."""
    script = f'mount -t tmpfs -o size=4m none "{tmp_path}" && exec "$0" -c "$1" "{tmp_path}"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, sys.executable, SMALL_DISK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()[:100]}")
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"errno {errno.ENOSPC}", "2 ['step-00001', 'step-00002']"], done.stderr
    assert lines[2] == (
        f"checkpoint of step 4: 1.1 MiB needed, 0.5 MiB free in {tmp_path}; make room: --resume goes on from step-00002"
    )
    full = f"no space left on the disk: 0.0 MiB free in {tmp_path}; make room: --resume goes on from step-00002"
    assert lines[3:] == [full, "as it was"], done.stderr
