"""`uniapl train --debug`: one part of each kind, in turn, with every log in sight and Ray's debugger at hand."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from cluster.job import JOB_CONFIG
from uniapl.config import Config

PATIENT = (
    "queue.lease_s",
    "reward.timeout_s",
    "cluster.start_timeout_s",
    "cluster.step_timeout_s",
    "cluster.broadcast_timeout_s",
)
"""Limits that would end a run which stands in a debugger."""
DAY_S = 86400.0
ALONE = ("rollout.actors", "learner.ranks", "reward.min_replicas", "reward.max_replicas")
OVERRIDES = [
    "queue.max_staleness=0",
    *(f"{key}=1" for key in ALONE),
    "rollout.min_actors=null",
    "rollout.max_actors=null",
    "rollout.max_restarts=0",
    "run.max_restarts=0",
    *(f"{key}={DAY_S}" for key in PATIENT),
]
"""Laid over the configuration; what the command line sets goes over it."""
ENVIRONMENT = {"RAY_DEBUG": "legacy", "RAY_DEDUP_LOGS": "0", "VLLM_LOGGING_LEVEL": "INFO"}
"""`breakpoint()` in any part waits for `ray debug`; no line of a log is left out. What is set already stays."""
_MARK = re.compile(r"^:(job_id|task_name|actor_name):(.*)$", re.MULTILINE)
"""Ray's lines in a log for its own use."""


def prepare() -> None:
    """Set what must stand in the environment before Ray starts."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def of_workers() -> dict[str, Any]:
    """The runtime environment of all parts: on other nodes nothing has been prepared. Ray takes no variable twice, and
    a job's own ones go to its workers anyway."""
    job = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("runtime_env") or {}
    return {"env_vars": {name: os.environ[name] for name in ENVIRONMENT.keys() - job.get("env_vars", {}).keys()}}


def ways(config: Config, address: str) -> str:
    """A line for the user. Ray takes 127.0.0.1 for another address of the machine where clusters are enabled."""
    from ray._private import ray_constants  # after `prepare`, which Ray reads when it is imported

    here = f"{ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR}=0 " if address.startswith("127.") else ""
    attach = f"RAY_DEBUG=legacy RAY_AUTH_MODE=token {here}ray debug --address {address}"
    return f"debug: a breakpoint() waits for `{attach}`; logs stand here and, at the end, in {config.run_dir / 'logs'}"


def keep_logs(session: Path, job: str, place: Path) -> None:
    """Copy what the parts of a job printed, a file for each process, from the folder of Ray's session.

    Args:
        session: on this machine; parts on other nodes left theirs there.
        job: Ray's id of the job.
        place: PART-PID.out and .err are put there.
    """
    place.mkdir(exist_ok=True)
    for path in sorted((session / "logs").glob(f"worker-*-{job}-*")):
        text = path.read_text(errors="replace")
        names = [name for kind, name in _MARK.findall(text) if kind == "actor_name"]
        said = _MARK.sub("", text).strip()
        if names and said:
            pid = path.stem.rpartition("-")[2]
            (place / f"{_file_name(names[-1])}-{pid}{path.suffix}").write_text(said + "\n")
    for path in (session / "logs" / "serve").glob("*.log"):
        shutil.copyfile(path, place / path.name)


def _file_name(actor: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", actor)[:100]
