"""A run as a job on a Ray cluster."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

from cluster.job import RUN_FOLDER
from cluster.jobs import job_client, job_output, stage, start_job
from uniapl.config import load_config
from uniapl.config_errors import ConfigError
from uniapl.shared_paths import require_absolute

AFTER_GRACE_S = 5
"""Ray's SIGKILL comes so long after `run.grace_seconds`."""


def submit(
    config: Path,
    overrides: list[str],
    methods: list[str],
    resume: bool,
    address: str | None,
    wait: bool,
    as_json: bool = False,
) -> int:
    """Send code and configuration below the current folder to a Ray cluster and train there.

    Args:
        config: a file below the current folder.
        overrides: of its keys.
        methods: see `load_config`.
        resume: go on with the run.
        address: of the cluster's dashboard, such as http://127.0.0.1:8265; None: RAY_API_SERVER_ADDRESS, or the
            cluster on this machine.
        wait: print what the job prints, until it ends.
        as_json: print the job's id and what was sent as one JSON object, and everything else to standard error.

    Returns:
        exit status: 0 once it has succeeded, or was submitted and not waited for; 2 if it failed or was stopped.

    Raises:
        ConfigError: wrong configuration, or what would go along is no code.
        RunError: no cluster answers, it refuses the job, or it goes while the job is waited for.
    """
    loaded = load_config(config, overrides, methods)
    require_absolute(loaded)
    here = Path.cwd()
    words = ["train", _below(config, here), *overrides]
    for method in methods:
        words += ["--method", _below(Path(method), here) if method.endswith((".yaml", ".yml")) else method]
    words += ["--resume"] if resume else []
    # Ray ends a job with SIGTERM, and with SIGKILL 3 s later if nobody says how long the checkpoint may take.
    stop = {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(loaded.run.grace_seconds) + AFTER_GRACE_S)}
    client = job_client(address)
    with tempfile.TemporaryDirectory(prefix="uniapl-submit-") as folder:
        sent = stage(here, Path(folder))
        job = start_job(client, words, folder, stop, {RUN_FOLDER: loaded.run_url or str(loaded.run_dir)})
    told, size = sys.stderr if as_json else sys.stdout, sum(sent.values())
    line = f"job {job}: {len(sent)} files, {size / 1024:.0f} KiB sent"
    print(json.dumps({"job": job, "files": len(sent), "bytes": size}) if as_json else line, flush=True)
    if not wait:
        print(_ways(job), file=told)
        return 0
    return _follow(client, job, told)


def _below(path: Path, here: Path) -> str:
    try:
        return str(path.resolve().relative_to(here.resolve()))
    except ValueError:
        raise ConfigError(f"{path}: does not go along; allowed: a file below the current folder, {here}") from None


def _follow(client: Any, job: str, told: TextIO) -> int:
    """Print the job's output until it ends; Ctrl-C leaves it running."""
    try:
        for text in job_output(client, job):
            print(text, end="", flush=True, file=told)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; {_ways(job)}", file=sys.stderr)
        return 130
    status = client.get_job_status(job).value
    print(f"job {job}: {status.lower()}", flush=True, file=told)
    return 0 if status == "SUCCEEDED" else 2


def _ways(job: str) -> str:
    return f"`ray job logs --follow {job}` shows it, `ray job stop {job}` ends it with a checkpoint"
