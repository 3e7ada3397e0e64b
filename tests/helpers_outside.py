"""A run looked at from outside: what its processes listen on, and where a secret stands."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
from helpers_cli import session_members

from uniapl.config_types import REDIS_PASSWORD, REWARD_TOKEN
from uniapl.loggers.to_wandb import API_KEY

SECRETS = (
    REDIS_PASSWORD,
    REWARD_TOKEN,
    API_KEY,
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "HF_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
"""Variables of the environment in which a run or one of its clients finds a password, key or token."""


def listening(leader: int) -> dict[str, set[str]]:
    """Addresses at which the processes of `leader`'s session listen, by the process's name."""
    found: dict[str, set[str]] = {}
    for pid, name in session_members(leader).items():
        try:
            sockets = psutil.Process(pid).net_connections("inet")
        except psutil.Error:  # it has ended
            continue
        own = {s.laddr.ip.removeprefix("::ffff:") for s in sockets if s.status == psutil.CONN_LISTEN}
        # A UDP socket receives from whoever finds it, connected ones but from their peer.
        own |= {s.laddr.ip for s in sockets if s.type == 2 and not s.raddr}
        found.setdefault(name[:160], set()).update(own)
    return found


def ray_session(leader: int) -> tuple[Path, str]:
    """The folder of the Ray that runs in `leader`'s session, and its token."""
    [(pid, line)] = [(p, n) for p, n in session_members(leader).items() if "/gcs_server " in n]
    folder = re.search(r"--log_dir=(\S+)/logs", line)
    token = re.search(rb"RAY_AUTH_TOKEN=(\w+)", Path(f"/proc/{pid}/environ").read_bytes())
    assert folder and token, line
    return Path(folder[1]), token[1].decode()


def files_with(folder: Path, *secrets: str) -> list[Path]:
    """Those of a folder in which any of `secrets` stands; a folder without files is an error."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5, folder
    return [path for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)]
