"""The training run: a system is started, makes one step after the other, and is started again if a part dies."""

from __future__ import annotations

import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import ray
from rich.console import Console

from actors.reward_service import stop_reward_service
from cluster import run_folder
from cluster.debug import ways
from cluster.evaluation import BesideTraining, evaluate
from cluster.failures import PartLostError, told_in_one_line
from cluster.observe import Exporter
from cluster.placement import Site
from cluster.preflight import preflight
from cluster.ray_session import ray_session
from cluster.resume import checkpoint, restore
from cluster.run_store import RunStore, open_store
from cluster.self_check import check_weight_round_trip, compare_after_training
from cluster.signals import Signals
from cluster.step import one_step
from cluster.system import System
from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.data.shards import with_local_data
from uniapl.live import LiveTable
from uniapl.loggers import Guarded, open_loggers
from uniapl.model_card import model_card
from uniapl.objective.controllers import Controllers
from uniapl.records import Prompt
from uniapl.report import write_report
from uniapl.runlog import RunLog
from uniapl.storage import StorageError, join


def train(config: Config, resume: bool = False, debug: bool = False) -> str:
    """Run the configuration to its end and write the report.

    Args:
        config: of the run.
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
    log = RunLog(folder, config.logging.tensorboard, _loggers(config, folder, resume))
    try:
        with LiveTable(config.run.steps, Console(force_terminal=False) if debug else None) as live:
            live.phase("starting Ray")
            with Signals(config.run.grace_seconds) as signals, ray_session(config, debug) as site:
                signals.arm()  # Ray took SIGTERM
                if debug:
                    live.note(ways(config, ray.get_runtime_context().gcs_address))
                exporter = Exporter(config.run.name)
                with store.settled() if store else nullcontext():
                    _live_through(Run(local, site, folder, heldout, log, exporter, live, signals, store), resume)
                live.phase("stopping")
    except BaseException:
        with suppress(OSError):  # such as a full disk, which is what the run ended with
            log.close(failed=True)
            write_report(folder)
            if store:
                _push_all_the_same(store)
        raise
    log.close()
    report = write_report(folder)
    if store is None:
        return str(report)
    store.push()
    return join(store.url, report.name)


def _push_all_the_same(store: RunStore) -> None:
    """At the end by an error, which is to be told and not another one."""
    try:
        store.push()
    except StorageError as error:
        warnings.warn(f"what the run wrote since its last checkpoint stays on this machine: {error}", stacklevel=2)


def _loggers(config: Config, folder: Path, resume: bool) -> list[Guarded]:
    """Started before anything else; a folder that was only just made for a run that cannot begin is free again."""
    try:
        return open_loggers(config, folder, resume)
    except ConfigError:
        if not resume:
            (folder / "config.yaml").unlink()
        raise


@dataclass(frozen=True)
class Run:
    """What stays the same in all lives of a run's system."""

    config: Config
    site: Site
    folder: Path
    heldout: list[Prompt]
    log: RunLog
    exporter: Exporter
    live: LiveTable
    signals: Signals
    store: RunStore | None


def _live_through(run: Run, resume: bool) -> None:
    """As many lives as it takes, and as `run.max_restarts` allows; one that made no step is the last."""
    for left in reversed(range(run.config.run.max_restarts + 1)):
        logged = run.log.logged
        try:
            _one_life(run, resume)
            break
        except PartLostError as error:
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
    with System(config, run.site, live.note) as system, told_in_one_line(system, folder):
        live.phase("loading engines, learner and reward service")
        system.start()
        controllers = Controllers(config.objective)
        first = restore(system, controllers, folder, run.log, store) if resume else 0
        live.phase("checking the weight round trip")
        live.note(check_weight_round_trip(system, first))
        _evaluate(run, system, first, "before" if first == 0 else None)
        beside = BesideTraining(system, run.heldout, folder, first, live.note)
        live.phase("training")
        system.begin_rollouts()
        for step in range(first, config.run.steps):
            with run.signals.step():
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
        _evaluate(run, system, config.run.steps, "after")
        live.phase("writing the model")
        run_folder.save_data_record(folder)
        system.learner.export(folder / "model", model_card(folder, config.run.steps, config.learner.dtype))
        if store:
            store.send_model(system.learner.nodes[0])


def _evaluate(run: Run, system: System, step: int, name: str | None) -> None:
    if not run.heldout or name is None:
        return
    run.live.phase(f"evaluating on {len(run.heldout)} held-out prompts")
    found = evaluate(system, run.heldout, step)
    found.save(run.folder / "eval" / f"{name}.json")
    rate = found.pass_rate
    if rate is not None:
        run.live.note(
            f"held-out pass rate {name} training: {rate.value:.1%} (95 % interval {rate.low:.1%} to {rate.high:.1%})"
        )
