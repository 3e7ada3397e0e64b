"""Jobs on a Ray cluster: what goes along, how they are started, and what they print."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uniapl.config_errors import ConfigError
from uniapl.runlog import RunError

SUFFIXES = {".css", ".html", ".jinja", ".js", ".py", ".toml", ".txt", ".yaml", ".yml"}
"""Of code and configuration; nothing else goes along. JSON does not: keys of cloud accounts come in it."""
LEFT_HERE = {"benchmarks", "build", "data", "docs", "models", "requirements", "runs", "tests"}
"""Folders at the top that are neither code of a run nor configuration, where they are no packages."""
MADE = {"checkpoints", "logs", "mlruns", "outputs", "trackio", "wandb"}
"""Folders of what runs leave, at any depth, where they are no packages."""
UNSAFE = ("apikey", "credential", "kubeconfig", "passwd", "password", "secret")
"""In no name."""
UNSAFE_WORDS = {"key", "keys", "token", "tokens"}
"""Whole words in the name of no file but code: what `token.txt` holds is secret, what `tokenizer.yaml` holds is not."""
LARGEST = 20 << 20
"""Bytes in all: code and configuration have far less."""
PACKAGES = ("uniapl", "actors", "learner", "cluster")
AGENT_S = 60.0
"""A head that has only just started has no agent for jobs yet: that is waited for."""


def stage(source: Path, target: Path) -> dict[str, int]:
    """Copy code and configuration, and this project's own packages where they are not among it.

    Returns:
        the copied files, as paths below `target`, with their bytes.

    Raises:
        ConfigError: they are more than code and configuration can be; names the largest. Or a package among them has
            the name of one of this project's.
    """
    found = _own_packages(source) | {path.relative_to(source): path for path in _files(source)}
    sizes = {str(name): path.stat().st_size for name, path in found.items()}
    if sum(sizes.values()) > LARGEST:
        largest = max(sizes, key=sizes.__getitem__)
        raise ConfigError(
            f"{source}: {sum(sizes.values()) >> 20} MiB of code and configuration would be sent, the largest is "
            f"{largest}; allowed: {LARGEST >> 20} MiB"
        )
    for name, path in found.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
    return sizes


def _own_packages(source: Path) -> dict[Path, Path]:
    """None where `source` has them all, as a copy of this project does."""
    root, there = Path(__file__).resolve().parent.parent, [name for name in PACKAGES if _is_package(source / name)]
    if len(there) == len(PACKAGES):
        return {}
    if there:
        raise ConfigError(
            f"{source / there[0]}: got a package that would take the place of this project's; allowed: another name"
        )
    return {path.relative_to(root): path for name in PACKAGES for path in _files(root / name, top=False)}


def _is_package(folder: Path) -> bool:
    return (folder / "__init__.py").is_file()


def _files(source: Path, top: bool = True) -> Iterator[Path]:
    for folder, inner, names in os.walk(source):
        at_top = top and Path(folder) == source
        stays = MADE | LEFT_HERE if at_top else MADE
        left = {n for n in inner if n in stays and not _is_package(Path(folder) / n)}
        inner[:] = sorted(n for n in inner if _goes_along(n) and n not in left)
        for name in sorted(names):
            path = Path(folder) / name
            if path.suffix in SUFFIXES and _goes_along(name) and not _is_key(path) and path.is_file():
                yield path


def _goes_along(name: str) -> bool:
    hidden = name.startswith((".", "__pycache__")) or name.endswith(".egg-info")
    return not hidden and not any(word in name.lower() for word in UNSAFE)


def _is_key(path: Path) -> bool:
    return path.suffix != ".py" and not UNSAFE_WORDS.isdisjoint(re.split(r"[^a-z]+", path.stem.lower()))


def job_client(address: str | None) -> Any:
    """A `JobSubmissionClient`; None: RAY_API_SERVER_ADDRESS, or the cluster on this machine.

    Raises:
        RunError: no cluster answers, or it knows another token.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        allowed = "a cluster's dashboard, such as http://127.0.0.1:8265"
        raise RunError(f"--address: got '{address}', {first_line(error)}; allowed: {allowed}") from None


def start_job(client: Any, words: list[str], folder: str, env: dict[str, str], metadata: dict[str, str]) -> str:
    """Run `uniapl WORDS` as a job in a copy of `folder`; returns its id.

    Raises:
        RunError: the cluster refuses it, or has had no agent for jobs for a minute.
    """
    # The packages that go along stand in the job's folder, and come before installed ones.
    entrypoint = shlex.join(["python", "-m", "cluster.cli", *words])
    runtime_env = {"working_dir": folder, "env_vars": env}
    deadline = time.monotonic() + AGENT_S
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env, metadata=metadata)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise RunError(f"the cluster refused the job: {first_line(error)}; its dashboard tells more") from None
        time.sleep(1)


def job_output(client: Any, job: str) -> Iterator[str]:
    """What a job prints, from its beginning to its end, in pieces.

    Raises:
        RunError: the cluster has gone.
    """
    pieces = client.tail_job_logs(job)
    with asyncio.Runner() as runner:
        while True:
            try:
                yield runner.run(_next(pieces))
            except StopAsyncIteration:
                return
            except RuntimeError as error:
                raise RunError(
                    f"job {job}: the cluster is gone: {first_line(error)}; `ray job logs {job}` tells more when it is "
                    "back, and on another one `uniapl submit --resume` goes on from the newest checkpoint"
                ) from None


async def _next(pieces: Any) -> str:
    return await anext(pieces)


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
