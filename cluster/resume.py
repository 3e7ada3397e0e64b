"""A run's whole state into a checkpoint and back: learner, queue, weights that follow measurements."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import ray

from cluster import checkpoints, run_folder
from cluster.system import System
from uniapl.config import Config
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
    checkpoints.remove_unfinished(folder)
    found = checkpoints.newest_checkpoint(folder)
    if found is None:
        log.truncate_after(0)
        return 0
    step, place = found
    if (line := checkpoints.other_versions(place)) is not None:
        warnings.warn(line, stacklevel=2)
    try:
        controllers.load_state_dict(run_folder.read_json(place / CONTROLLERS))
    except ValueError as error:
        raise RunError(f"{place}: {error}; allowed: the kinds of objective weights that the run began with") from None
    system.learner.load(place)
    ray.get(system.queue.load_state.remote(run_folder.read_json(place / QUEUE)))
    log.truncate_after(step)
    return step


def checkpoint(
    system: System, controllers: Controllers, folder: Path, step: int, live: LiveTable, asked: bool = False
) -> None:
    """Every `run.checkpoint_every` steps, after the last one, and when it is asked for.

    The learner and this loop wait for it; rollout actors and the queue go on meanwhile.

    Raises:
        RunError: it does not fit on the disk, or could not be written; older ones are untouched.
    """
    run = system.config.run
    due = run.checkpoint_every and step % run.checkpoint_every == 0
    if not (due or asked or step == run.steps):
        return
    began = time.monotonic()

    def write(place: Path) -> None:
        system.learner.save(place)
        run_folder.write_json(place / QUEUE, ray.get(system.queue.state.remote(step)))
        run_folder.write_json(place / CONTROLLERS, controllers.state_dict())

    checkpoints.require_space(folder, step, _trained_models(system.config))
    try:
        place = checkpoints.save_checkpoint(folder, step, run.keep_last, write, run.keep_every)
    except (OSError, ray.exceptions.RayTaskError) as error:
        raise RunError(_failed(folder, step, error)) from None
    live.note(f"checkpoint {place} in {time.monotonic() - began:.1f} s")


def _trained_models(config: Config) -> list[str]:
    """Folders of the models whose weights and optimizer a checkpoint holds."""
    own = config.objective.adversarial.cotrained
    return [config.model.path, *([own.model or config.model.path] if config.objective.cotrained else [])]


def _failed(folder: Path, step: int, error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    reason = " ".join(str(cause).split("\n")[0].split())[:200]
    space = checkpoints.free_space(folder)
    return f"checkpoint of step {step} could not be written: {reason}; {space}; make room: {checkpoints.kept(folder)}"
