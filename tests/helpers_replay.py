"""`uniapl replay` in a process forked from one that has imported torch and DeepSpeed: their imports take seconds."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

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
