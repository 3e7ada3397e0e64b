"""A run's whole state into a checkpoint and back: learner, queue, weights that follow measurements."""

from __future__ import annotations

import time
from pathlib import Path

import ray

from cluster import run_folder
from cluster.system import System
from uniapl.live import LiveTable
from uniapl.objective.controllers import Controllers
from uniapl.runlog import RunError, RunLog

QUEUE = "queue.json"
CONTROLLERS = "controllers.json"


def restore(system: System, controllers: Controllers, folder: Path, log: RunLog) -> int:
    """Load the newest whole checkpoint; returns the optimizer steps it holds, 0 without one.

    Raises:
        RunError: the checkpoint is of other coefficients than the configuration.
    """
    found = run_folder.newest_checkpoint(folder)
    if found is None:
        log.truncate_after(0)
        return 0
    step, place = found
    try:
        controllers.load_state_dict(run_folder.read_json(place / CONTROLLERS))
    except ValueError as error:
        raise RunError(f"{place}: {error}; allowed: the kinds of objective weights that the run began with") from None
    system.learner.load(place)
    ray.get(system.queue.load_state.remote(run_folder.read_json(place / QUEUE)))
    log.truncate_after(step)
    return step


def checkpoint(system: System, controllers: Controllers, folder: Path, step: int, live: LiveTable) -> None:
    """Every `run.checkpoint_every` steps, and after the last one."""
    run = system.config.run
    due = run.checkpoint_every and step % run.checkpoint_every == 0
    if not due and step != run.steps:
        return
    began = time.monotonic()

    def write(place: Path) -> None:
        system.learner.save(place)
        run_folder.write_json(place / QUEUE, ray.get(system.queue.state.remote(step)))
        run_folder.write_json(place / CONTROLLERS, controllers.state_dict())

    place = run_folder.save_checkpoint(folder, step, run.keep_last, write)
    live.note(f"checkpoint {place} in {time.monotonic() - began:.1f} s")
