"""`uniapl` whose driver is killed with SIGKILL in the middle of a chosen call; the rest is the real program.

    python killed_train.py CALL:STEP:SECONDS train CONFIG ...

CALL is a method of the learner group (step, broadcast, save) and STEP the optimizer step (from 1) that it is for; or
CALL is next_batch, connect or start and STEP counts this process's calls of it. SECONDS after the call's beginning
the driver dies. From outside nobody could hit a broadcast of milliseconds; so the driver tells itself when. The last
that it prints is whether the call was `UNDER_WAY`.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from cluster.cli import main
from cluster.system import System
from learner.group import LearnerGroup

STEP_OF: dict[str, Callable[..., int | None]] = {
    "step": lambda group, number, *rest: number + 1,
    "broadcast": lambda group, version, scale=1.0: version if scale == 1.0 else None,
    "save": lambda group, folder: int(folder.name.removeprefix("step-").removesuffix(".partial")),
}

UNDER_WAY = "killed while the call was under way"
RETURNED = "killed when the call had returned"

COUNTED: dict[str, type] = {"next_batch": System, "connect": LearnerGroup, "start": LearnerGroup}


def die_in(owner: type, name: str, step: int, seconds: float, step_of: Callable[..., int | None]) -> None:
    """Let `owner.name` for optimizer step `step` be the driver's last call."""
    method, returned = getattr(owner, name), threading.Event()

    def die() -> None:
        os.write(sys.__stdout__.fileno(), f"\n{RETURNED if returned.is_set() else UNDER_WAY}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def deadly(*arguments: Any, **named: Any) -> Any:
        if step_of(*arguments, **named) != step:
            return method(*arguments, **named)
        threading.Timer(seconds, die).start()
        try:
            return method(*arguments, **named)
        finally:
            returned.set()

    setattr(owner, name, deadly)


def arm(point: str) -> None:
    """Let the driver die at CALL:STEP:SECONDS."""
    call, step, seconds = point.split(":")
    calls = itertools.count(1)
    if call in COUNTED:
        die_in(COUNTED[call], call, int(step), float(seconds), lambda *_: next(calls))
    else:
        die_in(LearnerGroup, call, int(step), float(seconds), STEP_OF[call])


if __name__ == "__main__":
    arm(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
