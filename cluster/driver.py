"""The training run: a system is started, makes one step after the other, and is started again if a part dies."""

from __future__ import annotations

from actors.reward_service import stop_reward_service
from cluster import run_folder
from cluster.evaluation import BesideTraining, evaluate_and_save
from cluster.failures import PartLostError, told_in_one_line
from cluster.preflight import preflight
from cluster.resume import checkpoint, restore
from cluster.run import Run, close_failed_log, close_log, open_log, open_run
from cluster.run_store import open_store
from cluster.self_check import check_weight_round_trip, compare_after_training
from cluster.signals import Signals, Terminated
from cluster.step import one_step
from cluster.system import System
from uniapl.config import Config
from uniapl.data.shards import with_local_data
from uniapl.model_card import model_card
from uniapl.objective.controllers import Controllers


def train(config: Config, signals: Signals, resume: bool = False, debug: bool = False) -> str:
    """Run the configuration to its end and write the report.

    Args:
        config: of the run.
        signals: entered, and bounded for this run.
        resume: go on from the newest whole checkpoint of the run's folder.
        debug: show and keep the logs of all parts, and wait for Ray's debugger at a breakpoint.

    Returns:
        the path or URL of report.html.

    Raises:
        ConfigError, DataError: before any process starts.
        RunError: the run cannot go on; one line that says why.
        Terminated: by SIGTERM, after a checkpoint where `run.grace_seconds` allowed one.
    """
    store = open_store(config)
    local = with_local_data(config)
    heldout = preflight(local)
    folder = run_folder.open_run(config, resume, store)
    log = open_log(config, folder, resume)
    try:
        with open_run(local, folder, heldout, log, store, signals, debug) as run:
            _live_through(run, resume)
    except BaseException as error:
        signals.finish(error)
        close_failed_log(log, folder, store)
        raise
    signals.finish()
    return close_log(log, folder, store)


def _live_through(run: Run, resume: bool) -> None:
    """As many lives as it takes, and as `run.max_restarts` allows; one that made no step is the last."""
    for left in reversed(range(run.config.run.max_restarts + 1)):
        logged = run.log.logged
        try:
            _one_life(run, resume)
            break
        except PartLostError as error:
            if run.signals.asked:  # whoever ends a machine may have ended the run's other processes too
                raise Terminated(error.reason) from error
            if not left or run.log.logged == logged:
                raise
            times = "once more" if left == 1 else f"up to {left} times more"
            run.live.note(f"{error.reason}; the run starts again from its newest checkpoint ({times})")
            resume = True
            stop_reward_service()


def _one_life(run: Run, resume: bool) -> None:
    """Start the whole system, train to the last step, and end it.

    Raises:
        PartLostError: a part that is there once died, gave no answer in time, or found no room in Ray's store.
    """
    config, live, folder, store = run.config, run.live, run.folder, run.store
    if store:
        store.settle_before_a_restart(live.note)
    with System(config, run.site, live.note, run.signals.left) as system, told_in_one_line(system, folder):
        live.phase("loading engines, learner and reward service")
        system.start()
        controllers = Controllers(config.objective)
        first = restore(system, controllers, folder, run.log, live, store) if resume else 0
        live.phase("checking the weight round trip")
        live.note(check_weight_round_trip(system, first))
        if first == 0:
            evaluate_and_save(system, run.heldout, first, folder / "eval" / "before.json", live)
        beside = BesideTraining(system, run.heldout, folder, first, live.note)
        live.phase("training")
        system.begin_rollouts()
        for step in range(first, config.run.steps):
            with run.signals.held():
                metrics = one_step(system, controllers, folder, step, beside)
                run.log.log(step + 1, metrics)
                run.exporter.export(step + 1, metrics)
                live.step(step + 1, metrics)
                checkpoint(system, controllers, folder, step + 1, live, run.signals.asked, store)
        beside.finish()
        if store:
            live.phase("sending the last checkpoint")
            store.settle()
        if compared := compare_after_training(system):
            live.note(compared)
        evaluate_and_save(system, run.heldout, config.run.steps, folder / "eval" / "after.json", live)
        live.phase("writing the model")
        run_folder.save_data_record(folder)
        system.learner.export(folder / "model", model_card(folder, config.run.steps, config.learner.dtype))
        if store:
            store.send_model(system.learner.nodes[0])
