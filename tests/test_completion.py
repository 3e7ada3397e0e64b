"""Completion in the shells themselves: as TAB does it in a terminal, or the shell says it would."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TERM": "dumb", "PS1": "> "}
SHELLS = {
    "bash": (["--norc", "--noprofile", "-i"], ""),
    "zsh": (["-f", "-i"], "autoload -U compinit; compinit -u -D; "),
}
PATIENCE_S = 30.0


def installed(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed on this machine")


class Terminal:
    """A shell that believes somebody types into it."""

    def __init__(self, shell: str, options: list[str]) -> None:
        self._process, self._end = pty.fork()
        if self._process == 0:
            os.execvpe(shell, [shell, *options], ENVIRONMENT)

    def typed(self, keys: str, until: str) -> str:
        """What is shown from these keys on, up to the pattern `until`."""
        os.write(self._end, keys.encode())
        shown, deadline = "", time.monotonic() + PATIENCE_S
        while not re.search(until, shown):
            assert time.monotonic() < deadline, shown
            if select.select([self._end], [], [], 0.1)[0]:
                shown += os.read(self._end, 4096).decode(errors="replace")
        return shown

    def close(self) -> None:
        os.close(self._end)
        os.waitpid(self._process, 0)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_key_is_completed_level_by_level_in_one_word(shell: str) -> None:
    """Ctrl-A and `echo` make the line that came about its own output."""
    installed(shell)
    options, before = SHELLS[shell]
    terminal = Terminal(shell, options)
    try:
        terminal.typed(f'{before}eval "$(uniapl completion {shell})"; echo rea""dy\n', until="ready")
        terminal.typed("uniapl train c.yaml objective.kl.w\t", until=r"weight\.")
        terminal.typed("k\t", until="kind=")
        terminal.typed("\x01echo \x05\n", until=r"\nuniapl train c\.yaml objective\.kl\.weight\.kind=\s*\n")
    finally:
        terminal.close()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("uniapl re", ["replay", "report"]),
        ("uniapl replay runs/x 3 --", ["--failed", "--json", "--pdb"]),
        ("uniapl train c.yaml objective.kl.w", ["objective.kl.weight."]),
    ],
)
def test_fish_completes_commands_options_and_keys(line: str, wanted: list[str]) -> None:
    installed("fish")
    asking = f"uniapl completion fish | source; complete -C '{line}'"
    command = ["fish", "--no-config", "-c", asking]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert [word.split("\t")[0] for word in done.stdout.splitlines()] == wanted, done.stderr
