"""`killed_train.py` with ranks that stop in the middle of writing a checkpoint until the queue has got more groups.

The tiny model's own checkpoints are over before a group can be made, and would say nothing; all that is saved is saved
for real. So that the queue is not full by then, the reward (`helpers_toy.many_e_faulty`) gives no answer from the
beginning of such a step until the ranks have written the first half.

What the queue had got when the first half was written and when the ranks were told to go on goes into the run's folder,
one line each.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import patch

import torch
from killed_train import arm

from cluster import driver
from cluster.cli import main
from cluster.system import System
from learner import group
from learner.worker import LearnerRank

MORE_GROUPS = 3
LIMIT_S = 30.0
FILE = "committed-during-checkpoints.txt"
"""Lines of: step, groups committed when the first half was written, groups committed when the rest was."""


def half_written(checkpoint: Path) -> Path:
    """The file that says that a rank has written half of its optimizer's state, and waits."""
    return checkpoint.parents[1] / f"half-{checkpoint.name}"


def rest_wanted(checkpoint: Path) -> Path:
    """The file that lets the ranks write the other half."""
    return checkpoint.parents[1] / f"rest-{checkpoint.name}"


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.02)


class SlowRank(LearnerRank):
    """The real rank, whose file of the optimizer's state is torn until the driver lets it go on."""

    def save(self, folder: str) -> None:
        checkpoint, write = Path(folder), torch.save

        def in_two_halves(state: Any, path: str, **options: Any) -> None:
            buffer = io.BytesIO()
            write(state, buffer, **options)
            half = len(buffer.getvalue()) // 2
            with Path(path).open("wb") as file:
                file.write(buffer.getvalue()[:half])
                file.flush()
                if path.endswith("optim_states.pt"):
                    half_written(checkpoint).touch()
                    wait_until(rest_wanted(checkpoint).exists)
                file.write(buffer.getvalue()[half:])

        with patch.object(torch, "save", in_two_halves):
            super().save(folder)


def say(word: str) -> None:
    """What the reward does from now on."""
    Path(os.environ["TOY_SLOW"]).write_text(word)


def next_batch(system: System) -> Any:
    taken = take(system)
    if (taken.step + 1) % system.config.run.checkpoint_every == 0:
        say("hang")
    return taken


def checkpoint(system: System, controllers: Any, folder: Path, step: int, *rest: Any) -> None:
    place = folder / "checkpoints" / f"step-{step:05d}.partial"

    def watch() -> None:
        wait_until(half_written(place).exists)
        before = system.stats()["committed"]
        say("")
        wait_until(lambda: system.stats()["committed"] >= before + MORE_GROUPS)
        with (folder / FILE).open("a") as file:
            file.write(f"{step} {before} {system.stats()['committed']}\n")
        rest_wanted(place).touch()

    if step % system.config.run.checkpoint_every == 0:
        Thread(target=watch, daemon=True).start()
    save(system, controllers, folder, step, *rest)


if __name__ == "__main__":
    save, driver.checkpoint = driver.checkpoint, checkpoint
    take, System.next_batch = System.next_batch, next_batch
    group.LearnerRank = SlowRank
    arm(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
