"""Demonstrations alone, in three lives of one run: Ctrl-C twice ends the first, a full disk the second."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers_cli import ROOT, assert_nothing_left, environment, shared_memory, start
from helpers_toy import toy_config

from cluster.checkpoints import newest_checkpoint
from uniapl.runlog import read_metrics

SFT = ("-m", str(ROOT / "configs" / "methods" / "sft.yaml"))
AT_ONCE_S = 5.0
DISK_MIB = 60
TWO_LIVES = f"""
run=$1 disk=$2 kept=$3; shift 3
mount -t tmpfs -o size={DISK_MIB}m none "$disk" || exit 77
cp -r "$run" "$disk" && before=$(ls "$disk/sft/checkpoints")
( until [ "$(ls "$disk/sft/checkpoints")" != "$before" ]; do sleep 0.02; done
  head -c 100G /dev/zero > "$disk/other" 2> /dev/null ) &
"$@" "run.folder=$disk" > "$kept.out" 2> "$kept.err"
echo $? > "$kept.status"
cp -r "$disk/sft" "$kept"
rm -f "$disk/other"
"$@" "run.folder=$disk" "run.steps=$(($(wc -l < "$kept/metrics.jsonl") + 2))"
status=$?
cp -r "$disk/sft" "$kept.later"
exit $status
"""
"""The second life and the third, on a file system of their own. Another program takes all its room once the second
writes a checkpoint, and is gone before the third, which makes two steps more than were made before."""


@dataclass
class Interrupted:
    """The first life."""

    config: Path
    run: Path
    status: int
    took_s: float
    last: str
    saved: int
    """Step of its newest checkpoint."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Interrupted:
    folder = tmp_path_factory.mktemp("hard-ends")
    run = {"name": "sft", "steps": 1000, "checkpoint_every": 2, "keep_last": 2}
    config = toy_config(folder, tiny, run=run, evaluation={"prompts": 0})
    before = shared_memory()
    process = start(config, *SFT)
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if "step 5/" in line:
            break
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    took = time.monotonic() - began
    assert_nothing_left(process.pid, before, 10)
    found = newest_checkpoint(folder / "runs" / "sft")
    assert found is not None, seen + rest
    return Interrupted(
        config, folder / "runs" / "sft", process.returncode, took, (seen + rest).splitlines()[-1], found[0]
    )


@dataclass
class Filled:
    """The second life, and the third."""

    status: int
    told: str
    kept: Path
    """The run's folder as the second life left it."""
    third: subprocess.CompletedProcess[str]
    later: Path
    """The same of the third."""


@pytest.fixture(scope="module")
def filled(interrupted: Interrupted, tmp_path_factory: pytest.TempPathFactory) -> Filled:
    disk, kept = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("filled") / "kept"
    train = [sys.executable, "-m", "cluster.cli", "train", interrupted.config, *SFT, "--resume"]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", TWO_LIVES, "sh", interrupted.run, disk, kept]
    done = subprocess.run(
        [str(word) for word in (*command, *train)],
        cwd=disk.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()[:100]}")
    status = int(kept.with_suffix(".status").read_text())
    told = kept.with_suffix(".out").read_text() + kept.with_suffix(".err").read_text()
    return Filled(status, told, kept, done, kept.with_suffix(".later"))


def test_ctrl_c_twice_ends_at_once_and_says_what_resume_goes_on_from(interrupted: Interrupted) -> None:
    assert interrupted.status == 130
    assert interrupted.took_s < AT_ONCE_S
    assert interrupted.last == f"stopped at once; --resume goes on from step-{interrupted.saved:05d}"


def test_a_disk_that_fills_up_ends_the_run_with_one_line(filled: Filled) -> None:
    assert filled.status == 2, filled.told[-3000:]
    assert "Traceback" not in filled.told
    line = filled.told.rstrip().splitlines()[-1]
    assert line.startswith(("checkpoint of step ", "no space left on the disk: "))
    assert f" free in {filled.kept.parent}"


def test_the_last_checkpoint_is_whole(interrupted: Interrupted, filled: Filled) -> None:
    found = newest_checkpoint(filled.kept)
    assert found is not None and found[0] >= interrupted.saved
    assert filled.told.rstrip().endswith(f"--resume goes on from {found[1].name}")


def test_with_room_the_run_goes_on_to_its_last_step(filled: Filled) -> None:
    assert filled.third.returncode == 0, filled.third.stderr[-3000:]
    steps = [m["step"] for m in read_metrics(filled.later)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) == len(read_metrics(filled.kept)) + 2
    assert re.search(rf"^report: .*{re.escape('report.html')}$", filled.third.stdout, re.MULTILINE)
