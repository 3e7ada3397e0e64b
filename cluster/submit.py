"""A run as a job on a Ray cluster: what goes along, and what the job prints."""

from __future__ import annotations

import asyncio
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uniapl.config import load_config
from uniapl.config_errors import ConfigError
from uniapl.runlog import RunError
from uniapl.shared_paths import require_absolute

SUFFIXES = {".css", ".html", ".jinja", ".js", ".py", ".toml", ".txt", ".yaml", ".yml"}
"""Of code and configuration; nothing else goes along. JSON does not: keys of cloud accounts come in it."""
LEFT_HERE = {"benchmarks", "build", "data", "docs", "models", "requirements", "runs", "tests"}
"""Folders at the top that are neither code of a run nor configuration."""
UNSAFE = ("secret", "credential")
LARGEST = 20 << 20
"""Bytes in all: code and configuration have far less."""
AGENT_S = 60.0
AFTER_GRACE_S = 5
"""Ray's SIGKILL comes so long after `run.grace_seconds`."""


def submit(
    config: Path, overrides: list[str], method: str | None, resume: bool, address: str | None, wait: bool
) -> int:
    """Send code and configuration below the current folder to a Ray cluster and train there.

    Args:
        config: a file below the current folder.
        overrides: of its keys.
        method: see `load_config`.
        resume: go on with the run.
        address: of the cluster's dashboard, such as http://127.0.0.1:8265; None: RAY_API_SERVER_ADDRESS, or the
            cluster on this machine.
        wait: print what the job prints, until it ends.

    Returns:
        exit status: 0 once it has succeeded, or was submitted and not waited for; 2 if it failed or was stopped.

    Raises:
        ConfigError: wrong configuration, or what would go along is no code.
        RunError: no cluster answers, or it refuses the job.
    """
    loaded = load_config(config, overrides, method)
    require_absolute(loaded)
    here = Path.cwd()
    words = ["train", _below(config, here), *overrides]
    if method:
        words += ["--method", _below(Path(method), here) if method.endswith((".yaml", ".yml")) else method]
    words += ["--resume"] if resume else []
    # The packages that go along stand in the job's folder, and come before installed ones.
    entrypoint = shlex.join(["python", "-m", "cluster.cli", *words])
    # Ray ends a job with SIGTERM, and with SIGKILL 3 s later if nobody says how long the checkpoint may take.
    stop = {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(loaded.run.grace_seconds) + AFTER_GRACE_S)}
    with tempfile.TemporaryDirectory(prefix="uniapl-submit-") as folder:
        sent = stage(here, Path(folder))
        client = _client(address)
        job = _submit(client, entrypoint, {"working_dir": folder, "env_vars": stop}, {"run": loaded.run.name})
    print(f"job {job}: {len(sent)} files, {sum(sent.values()) / 1024:.0f} KiB sent", flush=True)
    if not wait:
        print(f"ray job logs --follow {job}   shows it; `ray job stop {job}` ends it with a checkpoint")
        return 0
    return _follow(client, job)


def stage(source: Path, target: Path) -> dict[str, int]:
    """Copy code and configuration; returns the copied files, as paths below `source`, with their bytes.

    Raises:
        ConfigError: they are more than code and configuration can be; names the largest.
    """
    found = {path.relative_to(source): path.stat().st_size for path in _files(source)}
    if sum(found.values()) > LARGEST:
        largest = max(found, key=found.__getitem__)
        raise ConfigError(
            f"{source}: {sum(found.values()) >> 20} MiB of code and configuration would be sent, the largest is "
            f"{largest}; allowed: {LARGEST >> 20} MiB"
        )
    for path in found:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)
    return {str(path): size for path, size in found.items()}


def _files(source: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(source):
        at_top = Path(folder) == source
        inner[:] = sorted(n for n in inner if _goes_along(n) and not (at_top and n in LEFT_HERE))
        for name in sorted(names):
            path = Path(folder) / name
            if path.suffix in SUFFIXES and _goes_along(name) and path.is_file():
                yield path


def _goes_along(name: str) -> bool:
    hidden = name.startswith((".", "__pycache__")) or name.endswith(".egg-info")
    return not hidden and not any(word in name.lower() for word in UNSAFE)


def _below(path: Path, here: Path) -> str:
    try:
        return str(path.resolve().relative_to(here.resolve()))
    except ValueError:
        raise ConfigError(f"{path}: does not go along; allowed: a file below the current folder, {here}") from None


def _client(address: str | None) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        allowed = "a cluster's dashboard, such as http://127.0.0.1:8265"
        raise RunError(f"--address: got '{address}', {_first_line(error)}; allowed: {allowed}") from None


def _submit(client: Any, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> str:
    """The job's id. A head that has only just started has no agent for jobs yet: that is waited for."""
    deadline = time.monotonic() + AGENT_S
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env, metadata=metadata)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise RunError(f"the cluster refused the job: {_first_line(error)}") from None
        time.sleep(1)


def _follow(client: Any, job: str) -> int:
    """Print the job's output until it ends; Ctrl-C leaves it running."""

    async def show() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    try:
        asyncio.run(show())
    except KeyboardInterrupt:
        ways = f"`ray job logs --follow {job}` shows it, `ray job stop {job}` ends it"
        print(f"\nthe job goes on; {ways}", file=sys.stderr)
        raise SystemExit(130) from None
    except RuntimeError as error:
        raise RunError(f"job {job}: the cluster is gone: {_first_line(error)}") from None
    status = client.get_job_status(job).value
    print(f"job {job}: {status.lower()}", flush=True)
    return 0 if status == "SUCCEEDED" else 2


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
