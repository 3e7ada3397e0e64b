"""The live table of a run that goes on elsewhere: from its folder, or through the dashboard of the cluster it is on."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from cluster.job import RUN_FOLDER
from cluster.jobs import job_client, job_output, stage, start_job
from uniapl.config import load_config
from uniapl.config_errors import ConfigError
from uniapl.live import LiveTable
from uniapl.runlog import ENDED_FILE, METRICS_FILE, RunError
from uniapl.storage import Entry, download, exists, is_remote, join, matches

LOOK_S = 0.5
LOOK_IN_STORE_S = 5.0
NO_RUN = "holds no config.yaml"
STOP_S = 20.0
"""For the small job to end; its record on the cluster is deleted then."""
Record = dict[str, Any]


def watch(place: str, run: str | None, as_json: bool) -> int:
    """Show a run until its last step, its end by an error or a signal, or Ctrl-C.

    Args:
        place: a run's folder, here or in an object store, or the address of a cluster's dashboard, such as
            http://127.0.0.1:8265.
        run: with an address: the run's folder on the cluster's storage; None: that of the newest run there.
        as_json: no table, but one JSON object for each step; `steps` in it is the run's last one.

    Returns:
        exit status.

    Raises:
        ConfigError: no run is there.
        RunError: no cluster answers, or it has no such job; or the run ended before its last step.
    """
    if place.startswith(("http://", "https://")):
        records = _on_cluster(place, run)
    else:
        records = _in_store(place) if is_remote(place) else follow(Path(place))
    try:
        if as_json:
            for record in records:
                print(json.dumps(record), flush=True)
        else:
            _show(place, records)
    except KeyboardInterrupt:
        return 130
    return 0


def _show(place: str, records: Iterator[Record]) -> None:
    first = next(records, None)
    if first is None:
        raise RunError(f"{place}: the run made no step; what it printed, or its job's log, tells why")
    trained = 0.0
    with LiveTable(first["steps"]) as live:
        for record in chain([first], records):
            trained += record.get("time/step", 0.0)
            live.step(record["step"], record, elapsed_s=trained)


def follow(folder: Path, refresh: Callable[[], None] = lambda: None) -> Iterator[Record]:
    """The metrics of every step made so far and, as they come, of all further ones, to the last.

    A run that goes on from a checkpoint makes some steps again; these come again. One that was ended by SIGKILL, or
    with its machine, is waited for: it may go on.

    Args:
        folder: of the run.
        refresh: called again and again; may replace the file of metrics.

    Raises:
        ConfigError: it is no run's folder.
        RunError: the run ended before its last step.
    """
    config, metrics = folder / "config.yaml", folder / METRICS_FILE
    if not config.is_file():
        raise ConfigError(f"{folder}: {NO_RUN}; allowed: the folder of a run, such as runs/local")
    last, total = 0, load_config(config).run.steps
    seen: dict[int, Record] = {}
    while last < total:
        ended = (folder / ENDED_FILE).exists()
        with suppress(FileNotFoundError), metrics.open("rb") as file:
            while (
                last < total and metrics.stat().st_ino == os.fstat(file.fileno()).st_ino
            ):  # a resumed run makes it anew
                for record in _whole(file):
                    if seen.get(record["step"]) != record:
                        last, seen[record["step"]] = record["step"], record
                        yield record | {"steps": total}
                if ended:
                    break
                time.sleep(LOOK_S)
                refresh()
                ended = (folder / ENDED_FILE).exists()
        if ended and last < total:
            raise RunError(f"{folder}: the run ended at step {last} of {total}; what it printed tells why")
        time.sleep(LOOK_S)
        refresh()


def _in_store(url: str) -> Iterator[Record]:
    """The same from a store, into which metrics come with every checkpoint."""
    with tempfile.TemporaryDirectory(prefix="uniapl-watch-") as name:
        folder, seen, looked = Path(name), list[Entry](), 0.0

        def refresh() -> None:
            nonlocal seen, looked
            if time.monotonic() - looked < LOOK_IN_STORE_S:
                return
            now, looked = matches(join(url, METRICS_FILE)), time.monotonic()
            if now and now != seen:
                download(now[0].url, folder / METRICS_FILE)
            seen = now
            if exists(join(url, ENDED_FILE)):
                (folder / ENDED_FILE).touch()

        if not exists(join(url, "config.yaml")):
            raise ConfigError(f"{url}: {NO_RUN}; allowed: the folder of a run, such as s3://BUCKET/runs/NAME")
        download(join(url, "config.yaml"), folder / "config.yaml")
        refresh()
        yield from follow(folder, refresh)


def _whole(file: BinaryIO) -> list[Record]:
    """The lines from here on that are whole."""
    found = []
    while (line := file.readline()).endswith(b"\n"):
        found.append(json.loads(line))
    file.seek(-len(line), os.SEEK_CUR)
    return found


def _on_cluster(address: str, run: str | None) -> Iterator[Record]:
    """The same from a small job there, since its storage need not be mounted here."""
    client = job_client(address)
    if run is not None:
        yield from _from_job(client, run)
        return
    newest = _newest_job(client)
    while True:
        try:
            yield from _from_job(client, newest.metadata[RUN_FOLDER])
            return
        except RunError as error:  # a job that was only just sent has made no folder yet
            if NO_RUN not in str(error) or client.get_job_status(newest.submission_id).is_terminal():
                raise
        time.sleep(LOOK_S)


def _from_job(client: Any, folder: str) -> Iterator[Record]:
    with tempfile.TemporaryDirectory(prefix="uniapl-watch-") as code:
        stage(Path(code), Path(code))
        job = start_job(client, ["watch", folder, "--json"], code, {}, {})
    try:
        text = said = ""
        for piece in job_output(client, job):
            *lines, text = (text + piece).split("\n")
            for line in lines:
                if line.startswith("{"):
                    yield json.loads(line)
                elif line:
                    said = line
        if client.get_job_status(job).value == "FAILED":
            raise RunError(said)
    finally:
        _remove(client, job)


def _remove(client: Any, job: str) -> None:
    """End the small job and delete its record; a cluster that is gone has none."""
    deadline = time.monotonic() + STOP_S
    with suppress(ConnectionError, RuntimeError):
        client.stop_job(job)
        while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        client.delete_job(job)


def _newest_job(client: Any) -> Any:
    jobs = [job for job in client.list_jobs() if RUN_FOLDER in (job.metadata or {})]
    if not jobs:
        raise RunError("no job there is a run that has begun; allowed: with a run's folder on the cluster's storage")
    return max(jobs, key=lambda job: job.start_time or 0)
