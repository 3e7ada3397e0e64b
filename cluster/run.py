"""What a run has from its beginning to its end, through all lives of its system: folder, logs, Ray, the user's view."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import ray
from rich.console import Console

from cluster.debug import ways
from cluster.job import in_job, record_run
from cluster.observe import Exporter
from cluster.placement import Site
from cluster.ray_session import own_ray, ray_session
from cluster.run_store import RunStore
from cluster.signals import Signals
from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.live import LiveTable
from uniapl.loggers import open_loggers
from uniapl.records import Prompt
from uniapl.report import write_report
from uniapl.runlog import RunLog
from uniapl.storage import join


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


@contextmanager
def open_run(
    config: Config,
    folder: Path,
    heldout: list[Prompt],
    log: RunLog,
    store: RunStore | None,
    signals: Signals,
    debug: bool,
) -> Iterator[Run]:
    """Ray and the live table inside of the block; a checkpoint under way is sent before Ray ends.

    Args:
        config: of the run, with its data on this machine.
        folder: of the run, or its working copy.
        heldout: prompts to evaluate on.
        log: of the run; the caller closes it.
        store: of the run, where its folder is a URL.
        signals: which are taken already.
        debug: as in `cluster.driver.train`.
    """
    with LiveTable(config.run.steps, Console(force_terminal=False) if debug else None) as live:
        live.phase("starting Ray")
        with ray_session(config, debug) as site:
            signals.arm()  # Ray took SIGTERM
            if not own_ray(config):
                live.note(site.told)
            if in_job():
                record_run(config.run_url or str(config.run_dir))
            if debug:
                live.note(ways(config, ray.get_runtime_context().gcs_address))
            exporter = Exporter(config.run.name)
            with store.settled() if store else nullcontext():
                yield Run(config, site, folder, heldout, log, exporter, live, signals, store)
            live.phase("stopping")


def open_log(config: Config, folder: Path, resume: bool) -> RunLog:
    """Started before anything else; a folder that was only just made for a run that cannot begin is free again."""
    try:
        return RunLog(folder, config.logging.tensorboard, open_loggers(config, folder, resume))
    except ConfigError:
        if not resume:
            (folder / "config.yaml").unlink()
        raise


def close_log(log: RunLog, folder: Path, store: RunStore | None) -> str:
    """Close the log of a run that made all its steps, and write its report; returns the report's path or URL."""
    log.close()
    report = write_report(folder)
    if store is None:
        return str(report)
    store.push()
    return join(store.url, report.name)


def close_failed_log(log: RunLog, folder: Path, store: RunStore | None) -> None:
    """The same at the end by an error, which is to be told and not another one: such as that of a full disk."""
    _all_the_same("metrics", lambda: log.close(failed=True))
    _all_the_same("report", lambda: write_report(folder))
    if store:
        _all_the_same("what the run wrote since its last checkpoint stays on this machine", store.push)


def _all_the_same(what: str, end: Callable[[], object]) -> None:
    try:
        end()
    except Exception as error:
        warnings.warn(f"{what}: {error}", stacklevel=2)
