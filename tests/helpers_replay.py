"""`uniapl replay` as it is typed, and, as the imports of torch and DeepSpeed take seconds, in a process forked from one
that has them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers_cli import environment
from helpers_zero import rank_processes

LIMIT_S = 120


def uniapl_replay(run: Path, *arguments: str, typed: str = "") -> tuple[int, str]:
    """With `typed` as standard input; exit status and standard output; standard error stands in `run`/replay.log."""
    out = run / "replay.out"
    process = rank_processes().Process(target=_main, args=(run, out, arguments, typed), daemon=True)
    process.start()
    process.join(LIMIT_S)
    process.kill()
    assert process.exitcode is not None, (run / "replay.log").read_text()[-3000:]
    return process.exitcode, out.read_text()


def replayed(run: Path, step: int) -> dict[str, Any]:
    """What `uniapl replay --json` says of a step to a program: its standard output, and nothing else is there."""
    command = [sys.executable, "-m", "cluster.cli", "replay", str(run), str(step), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=LIMIT_S)
    assert done.stdout, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if found["reproduced"] else 1)
    return found


def _main(run: Path, out: Path, arguments: tuple[str, ...], typed: str) -> None:
    from cluster.cli import main

    sys.stdin = io.StringIO(typed)
    os.environ["COLUMNS"] = "100"
    log = os.open(run / "replay.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with out.open("w") as file, contextlib.redirect_stdout(file):
        status = main(["replay", str(run), *arguments])
    os._exit(status)
