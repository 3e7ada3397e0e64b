"""A run's whole state into a checkpoint and back: learner, queue, weights that follow measurements."""

from __future__ import annotations

import shutil
import time
import warnings
from pathlib import Path

import ray

from cluster import checkpoints, run_folder
from cluster.run_store import RunStore
from cluster.system import System
from uniapl.config import Config
from uniapl.live import LiveTable
from uniapl.objective.controllers import Controllers
from uniapl.runlog import RunError, RunLog

QUEUE = "queue.json"
CONTROLLERS = "controllers.json"


def restore(
    system: System, controllers: Controllers, folder: Path, log: RunLog, live: LiveTable, store: RunStore | None = None
) -> int:
    """Load the newest whole checkpoint, of the `store` where there is one; returns the optimizer steps it holds, 0
    without one.

    Raises:
        RunError: the checkpoint is of other coefficients than the configuration.
    """
    checkpoints.remove_unfinished(folder)
    found = _newest(system, folder, store)
    if found is None:
        log.truncate_after(0)
        return 0
    step, place, saved_by = found
    if (line := checkpoints.other_versions(place)) is not None:
        warnings.warn(line, stacklevel=2)
    try:
        controllers.load_state_dict(run_folder.read_json(place / CONTROLLERS))
    except ValueError as error:
        raise RunError(f"{place}: {error}; allowed: the kinds of objective weights that the run began with") from None
    system.learner.load(place, saved_by, live.note)
    system.answer(system.queue.load_state.remote(run_folder.read_json(place / QUEUE)))
    log.truncate_after(step)
    return step


def _newest(system: System, folder: Path, store: RunStore | None) -> tuple[int, Path, int | None] | None:
    """Step, folder and, where only what each rank needs is here, the number of ranks that wrote it."""
    if store is not None:
        return store.fetch_newest(system.learner.nodes)
    found = checkpoints.newest_checkpoint(folder)
    return None if found is None else (*found, None)


def checkpoint(
    system: System,
    controllers: Controllers,
    folder: Path,
    step: int,
    live: LiveTable,
    asked: bool = False,
    store: RunStore | None = None,
) -> None:
    """Every `run.checkpoint_every` steps, after the last one, and when it is asked for.

    The learner and this loop wait for it; rollout actors and the queue go on meanwhile. Into a `store` it is sent
    beside the steps that follow, but for one that is asked for: somebody wants to end this machine.

    Raises:
        RunError: it does not fit on the disk, or could not be written; older ones are untouched. Or the last one could
            not be sent.
    """
    run = system.config.run
    if store is not None:
        store.raise_failed()
    due = run.checkpoint_every and step % run.checkpoint_every == 0
    if not (due or asked or step == run.steps):
        return
    began = time.monotonic()

    def write(place: Path) -> None:
        system.learner.save(place)
        run_folder.write_json(place / QUEUE, system.answer(system.queue.state.remote(step)))
        run_folder.write_json(place / CONTROLLERS, controllers.state_dict())
        shutil.copyfile(folder / "config.yaml", place / "config.yaml")  # the run's own is replaced at a resume

    if store is None:
        checkpoints.require_space(folder, step, _trained_models(system.config))
    else:
        store.settle()
        checkpoints.require_scratch_space(folder, step, _trained_models(system.config), _here(system.learner.nodes))
    try:
        place = checkpoints.save_checkpoint(folder, step, run.keep_last, write, run.keep_every)
    except (OSError, ray.exceptions.RayTaskError) as error:
        raise RunError(_failed(folder, step, error)) from None
    live.note(f"checkpoint {place} in {time.monotonic() - began:.1f} s")
    if store is not None:
        store.begin(step, place, system.learner.nodes, live.note)
        if asked:
            store.settle()


def _here(nodes: list[str]) -> float:
    """The share of the learner ranks that are on the driver's node."""
    return nodes.count(ray.get_runtime_context().get_node_id()) / len(nodes)


def _trained_models(config: Config) -> list[str]:
    """Folders of the models whose weights and optimizer a checkpoint holds."""
    own = config.objective.adversarial.cotrained
    return [config.model.path, *([own.model or config.model.path] if config.objective.cotrained else [])]


def _failed(folder: Path, step: int, error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    reason = " ".join(str(cause).split("\n")[0].split())[:200]
    space = checkpoints.free_space(folder)
    return f"checkpoint of step {step} could not be written: {reason}; {space}; make room: {checkpoints.kept(folder)}"
