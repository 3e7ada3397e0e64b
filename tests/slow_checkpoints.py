"""`killed_train.py` with checkpoints that take their time: each lasts until the queue has got more groups, or 30 s.

The tiny model's own are over before a group can be made, and would say nothing; all that is saved is saved for real.

What the queue had got when the checkpoint began and before it ended goes into the run's folder, one line each.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from killed_train import arm

from cluster import driver
from cluster.cli import main

MORE_GROUPS = 3
LIMIT_S = 30.0
FILE = "committed-during-checkpoints.txt"
"""Lines of: step, groups committed at the beginning, groups committed at the end."""


def slow(system: Any, controllers: Any, folder: Path, step: int, *rest: Any) -> None:
    save = system.learner.save

    def save_and_wait(place: Path) -> None:
        deadline, before = time.monotonic() + LIMIT_S, system.stats()["committed"]
        save(place)
        while (now := system.stats()["committed"]) < before + MORE_GROUPS and time.monotonic() < deadline:
            time.sleep(0.05)
        with (folder / FILE).open("a") as file:
            file.write(f"{step} {before} {now}\n")

    system.learner.save = save_and_wait
    try:
        checkpoint(system, controllers, folder, step, *rest)
    finally:
        system.learner.save = save


if __name__ == "__main__":
    checkpoint, driver.checkpoint = driver.checkpoint, slow
    arm(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
