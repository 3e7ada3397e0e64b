"""Kill -9 of the driver at random points, a disk that fills up, Ctrl-C twice, SIGTERM: the long forms."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers_cli import RAYS_OWN_S, assert_nothing_left, environment, killed, shared_memory, signalled, start, train
from helpers_exact import differences
from helpers_toy import toy_config
from killed_train import RETURNED, UNDER_WAY

from cluster.checkpoints import newest_checkpoint
from uniapl.runlog import read_metrics

pytestmark = pytest.mark.chaos
SEED = 5
STEPS = 24
"""More than all kills together let pass."""
GRACE_S = 60
ALL_GRACE_S = 30
"""Where all processes get it; with more than 60 s Ray may end the driver before."""
STARTING_S = {"start": 8.0, "connect": 0.5}
LOOP_S = {"next_batch": 1.0, "step": 0.15, "broadcast": 0.05, "save": 0.15}
"""Calls and how long after their beginning the driver may die: about as long as they take."""
PARTS = (0.05, 0.3, 1.0)
"""Of these times, one kill within each for every call of the loop: 14 with those of a start. Within the first a call is
under way on any machine."""


def config(folder: Path, model: Path, name: str, steps: int = STEPS, folder_of_runs: Path | None = None) -> Path:
    run = {"name": name, "steps": steps, "checkpoint_every": 1, "keep_last": 3, "keep_every": 4}
    if folder_of_runs:
        run["folder"] = str(folder_of_runs)
    return toy_config(
        folder / name,
        model,
        run=run,
        rollout={"actors": 2},
        learner={"ranks": 2},
        objective={"adversarial": {"weight": 0.1, "discriminator": "embedding"}},
        evaluation={"prompts": 0},
    )


def test_a_run_killed_at_random_points_is_the_undisturbed_run_bit_for_bit(tmp_path: Path, tiny: Path) -> None:
    train(config(tmp_path, tiny, "undisturbed"))
    place, draw, points, drivers = config(tmp_path, tiny, "killed"), random.Random(SEED), list[str](), list[int]()
    before = shared_memory()
    run = tmp_path / "killed" / "runs" / "killed"
    calls = [*STARTING_S.items(), *((call, part * limit) for part in PARTS for call, limit in LOOP_S.items())]
    draw.shuffle(calls)
    seen: Counter[tuple[str, str]] = Counter()
    for number, (call, limit) in enumerate(calls):
        made = (newest_checkpoint(run) or (0, None))[0]
        step = 1 if call in STARTING_S else draw.randint(1, 2) + (0 if call == "next_batch" else made)
        point = f"{call}:{step}:{draw.uniform(0, limit):.4f}"
        ended, driver, line = killed(place, point, *(["--resume"] if number else []))
        drivers.append(driver)
        seen[call, line] += 1
        points.append(f"{point} after {made} steps: {line}, orphans gone in {ended:.1f} s")
        print(points[-1], flush=True)
    for driver in drivers:
        assert_nothing_left(driver, before, RAYS_OWN_S)
    train(place, "--resume")
    assert differences(run, tmp_path / "undisturbed" / "runs" / "undisturbed", STEPS) == [], points
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        f"step-{k:05d}" for k in (4, 8, 12, 16, 20, 22, 23, 24)
    ]
    assert {line for _, line in seen} <= {UNDER_WAY, RETURNED}
    for call in LOOP_S:
        assert seen[call, UNDER_WAY] > 0, points


def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_the_last_checkpoint_whole(
    tmp_path: Path, tiny: Path
) -> None:
    """On a file system of its own, in which a second program takes the room between two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    place = config(tmp_path, tiny, "full", folder_of_runs=disk)
    fill = f'head -c 100G /dev/zero > "{disk}/other" 2>/dev/null'
    wait = f'until [ -e "{disk}/full/checkpoints/step-00002" ]; do sleep 0.02; done'
    script = f'mount -t tmpfs -o size=60m none "{disk}" || exit 77; ({wait}; {fill}) & "$0" -m cluster.cli train "$1"; '
    script += f'status=$?; rm -f "{disk}/other"; cp -r "{disk}/full" "{tmp_path}/kept"; exit $status'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, sys.executable, str(place)]
    done = subprocess.run(command, cwd=place.parent, env=environment(), capture_output=True, text=True, timeout=900)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()[:100]}")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    line = done.stderr.rstrip().splitlines()[-1]
    assert line.startswith(("checkpoint of step ", "no space left on the disk: "))
    assert "--resume goes on from step-0000" in line
    found = newest_checkpoint(tmp_path / "kept")
    assert found is not None and found[0] >= 2


def test_ctrl_c_twice_ends_at_once(tmp_path: Path, tiny: Path) -> None:
    place, before = config(tmp_path, tiny, "twice"), shared_memory()
    process = start(place)
    assert process.stdout is not None
    for line in process.stdout:
        if "step 2/" in line:
            break
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == 130, rest
    assert re.search(r"stopped at once; --resume goes on from step-\d{5}$", rest.rstrip())
    assert_nothing_left(process.pid, before, 10)


def test_sigterm_saves_the_step_under_way_within_the_grace_time(tmp_path: Path, tiny: Path) -> None:
    place = config(tmp_path, tiny, "ended")
    options = ("run.checkpoint_every=0", f"run.grace_seconds={GRACE_S}", "run.steps=500")
    status, output = signalled(place, "step 2/", signal.SIGTERM, *options, within_s=GRACE_S)
    assert status == 0
    run = tmp_path / "ended" / "runs" / "ended"
    found = newest_checkpoint(run)
    assert found is not None and 2 <= found[0] == read_metrics(run)[-1]["step"] < 500
    assert output.rstrip().endswith(f"ended by SIGTERM; --resume goes on from {found[1].name}")


def test_sigterm_to_all_processes_ends_the_run_within_the_grace_time_too(tmp_path: Path, tiny: Path) -> None:
    """There is nobody left who could save the step under way."""
    place = config(tmp_path, tiny, "all")
    options = (f"run.grace_seconds={ALL_GRACE_S}", "run.steps=500")
    status, output = signalled(place, "step 3/", signal.SIGTERM, *options, within_s=ALL_GRACE_S, everyone=True)
    assert status == 0
    found = newest_checkpoint(tmp_path / "all" / "runs" / "all")
    assert found is not None and found[0] >= 2
    last = output.rstrip().splitlines()[-1]
    assert last.startswith("ended by SIGTERM") and last.endswith(f"; --resume goes on from {found[1].name}")
