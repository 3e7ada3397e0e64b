"""The command line as a user runs it, and what it must not leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

ROOT = Path(__file__).resolve().parent.parent
ORPHANS_S = 30.0
"""How long the run's processes may take to end after their driver was killed."""
RAYS_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::IDLE")
"""Ray's helpers, which try for a minute to report that their node is gone, and a worker that was only just being
started, which looks for its node as long; none of them runs code of ours."""
RAYS_OWN_S = 120.0


def environment() -> dict[str, str]:
    """This process's, as it is now: a Ray that runs in it may have set how it is to be asked."""
    path = [str(ROOT), str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(":")]
    return os.environ | {"PYTHONPATH": ":".join(filter(None, path)), "PYTHONUNBUFFERED": "1"}


def start(
    config: Path, *arguments: str, program: tuple[str, ...] = ("-m", "cluster.cli"), folder: Path | None = None
) -> subprocess.Popen[str]:
    """`uniapl train` in a process group of its own, as a shell starts it in `folder`; by default beside the config."""
    return subprocess.Popen(
        [sys.executable, *program, "train", str(config), *arguments],
        cwd=folder or config.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A suite that runs in the background of a shell hands on that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def train(config: Path, *arguments: str) -> str:
    """A run to its end; returns what it printed."""
    process = start(config, *arguments)
    output, _ = process.communicate(timeout=540)
    assert process.returncode == 0, output[-4000:]
    return output


def session_members(leader: int) -> dict[int, str]:
    """Command lines of the processes that still run in `leader`'s session, by process id."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found[int(stat.parent.name)] = stat.with_name("cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return set(os.listdir("/dev/shm"))


def mapped_shared_memory(processes: Iterable[int]) -> set[str]:
    """Names in /dev/shm of what processes have in their memory; there a semaphore has the name it was made with."""
    inodes: set[int] = set()
    for pid in processes:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            inodes |= {int(line.split()[4]) for line in lines if "/dev/shm/" in line}
    return {entry.name for entry in os.scandir("/dev/shm") if entry.inode() in inodes}


def batch_rows(run: Path) -> list[list[dict[str, Any]]]:
    """What each step of a run consumed: its rows of samples and demonstrations."""
    return [pa.ipc.open_file(p).read_all().to_pylist() for p in sorted((run / "batches").glob("*.arrow"))]


def assert_nothing_left(leader: int, memory: set[str], within_s: float, but: tuple[str, ...] = ()) -> float:
    """No process of `leader`'s session and nothing new in /dev/shm, at the latest after `within_s`; the seconds.

    Args:
        but: beginnings of the names of processes that may be there still.
    """
    began = time.monotonic()
    while left := [name for name in session_members(leader).values() if not (but and name.startswith(but))]:
        assert time.monotonic() - began < within_s, left
        time.sleep(0.1)
    took = time.monotonic() - began
    assert_memory_freed(memory)
    return took


def litter(before: set[str]) -> set[str]:
    """What is new in /dev/shm and in no process's memory, after a minute for what goes by itself.

    Other tests run at the same time: what they have there is mapped by their processes.
    """
    deadline = time.monotonic() + 60
    while left := shared_memory() - before - mapped_shared_memory(psutil.pids()):
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return left


def assert_memory_freed(before: set[str]) -> None:
    """Nothing was left in /dev/shm."""
    left = litter(before)
    assert not left, left  # in words: pytest does not rewrite the assertions of helpers


def killed(place: Path, call: str, *arguments: str, program: str = "killed_train.py") -> tuple[float, int, str]:
    """Run until the driver kills itself in `call`, as `program` says.

    Returns:
        seconds until the last process but for `RAYS_OWN` had ended, the driver's process id, and its last line.
    """
    before = shared_memory()
    process = start(place, *arguments, program=(str(ROOT / "tests" / program), call))
    process.wait(timeout=540)  # what it prints until then fits into the pipe
    ended = assert_nothing_left(process.pid, before, ORPHANS_S, but=RAYS_OWN)
    assert process.returncode == -signal.SIGKILL, process.communicate()[0][-3000:]
    assert process.stdout is not None
    printed = os.read(process.stdout.fileno(), 1 << 16).decode()  # not to its end: Ray's own may hold the pipe open
    return ended, process.pid, printed.rstrip().rpartition("\n")[2]


def signalled(
    place: Path,
    after: str,
    number: int,
    *arguments: str,
    within_s: float = 150,
    told: Callable[[str], None] = lambda line: None,
    everyone: bool = False,
) -> tuple[int, str]:
    """Send a signal when `after` was printed, and see the run end `within_s`; exit status and output.

    `told` is called with every line until then.

    Ctrl-C goes to the whole process group, as a terminal sends it, SIGTERM to the driver, as Ray sends it, or to
    `everyone` of the run.
    """
    before = shared_memory()
    process = start(place, *arguments)
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        told(line)
        if after in line:
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            for other in session_members(process.pid) if everyone else ():
                with suppress(ProcessLookupError):
                    os.kill(other, number)
            break
    rest, _ = process.communicate(timeout=within_s)
    assert "Traceback" not in rest, seen + rest
    assert_nothing_left(process.pid, before, 20)
    return process.returncode, seen + rest
