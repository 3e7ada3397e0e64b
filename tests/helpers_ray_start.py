"""A Ray cluster of several nodes on this machine, started as a user starts it: `ray start --block`, with a token."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from helpers_cli import ROOT, mapped_shared_memory, session_members

BIN = Path(sys.executable).parent
UP_S = 90.0
STORE = 80 << 20


@dataclass
class RayCluster:
    """Its nodes by name, and how to reach it."""

    folder: Path
    environment: dict[str, str]
    port: int
    dashboard: str
    short: str
    """A folder with a short path: the names of Ray's sockets hold it, and have 107 characters."""
    on_nodes: dict[str, str] = field(default_factory=dict)
    """What is different in the nodes' environment."""
    places: dict[str, Path] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    """Temporary folder and URL of the metrics, by node."""
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start_node(self, name: str, *options: str) -> None:
        """A node of so many CPUs and resources as `options` say; its output goes to NAME.log."""
        # Nodes of one machine would else unpack a job's working folder over each other.
        place = tempfile.mkdtemp(prefix="ray", dir=self.short)
        exported = _free_port()
        ports = [f"--dashboard-agent-listen-port={_free_port()}", f"--metrics-export-port={exported}"]
        self.places[name], self.metrics[name] = Path(place), f"http://127.0.0.1:{exported}/metrics"
        command = [BIN / "ray", "start", "--block", "--disable-usage-stats", f"--object-store-memory={STORE}"]
        own = {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}
        with (self.folder / f"{name}.log").open("wb") as log:
            self.nodes[name] = subprocess.Popen(
                [*command, f"--temp-dir={place}", *ports, *options],
                cwd=self.folder,
                env=self.environment | own | self.on_nodes,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def join(self, name: str, cpus: int, **resources: float) -> None:
        self.start_node(
            name, f"--address=127.0.0.1:{self.port}", f"--num-cpus={cpus}", f"--resources={json.dumps(resources)}"
        )

    def of(self, name: str, word: str) -> list[psutil.Process]:
        """Processes of a node with this word in their title."""
        found = []
        for process in psutil.Process(self.nodes[name].pid).children(recursive=True):
            try:
                if word in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self, name: str) -> None:
        """SIGKILL for all of a node's processes at once, as when its machine goes; also for what it left behind.

        What they have of /dev/shm in their memory goes too, as with the machine: nobody is left who could clear it.
        """
        node = self.nodes.pop(name)
        _signal(node.pid, signal.SIGSTOP)
        shared = mapped_shared_memory(session_members(node.pid))
        _signal(node.pid, signal.SIGKILL)
        node.wait(timeout=30)
        deadline = time.monotonic() + 30
        while left := session_members(node.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        for segment in shared:
            Path("/dev/shm", segment).unlink(missing_ok=True)

    def ray(self, *words: str, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """A command of Ray's."""
        return self.run(str(BIN / "ray"), *words, cwd=cwd, timeout=timeout)

    def run(self, *command: str, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )


@contextmanager
def ray_start(folder: Path, on_nodes: dict[str, str]) -> Iterator[RayCluster]:
    """A head without CPUs; nodes join it with `join`. All of it ends with the block.

    Every Ray command inside is asked for the token that stands in the cluster's environment.

    Args:
        folder: for the nodes' output.
        on_nodes: what is different in the nodes' environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, dashboard = _free_port(), _free_port()
    environment = dict(os.environ) | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONUNBUFFERED": "1",
    }
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        environment.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="r-", ignore_cleanup_errors=True) as short:
        made = RayCluster(folder, environment, port, f"http://127.0.0.1:{dashboard}", short, on_nodes)
        head = ("--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1")
        made.start_node("head", *head, "--node-ip-address=127.0.0.1", "--num-cpus=0")
        try:
            _until_up(made)
            yield made
        finally:
            for name in list(made.nodes):
                made.kill(name)


def _until_up(cluster: RayCluster) -> None:
    """Until it answers about its jobs; asked without a Ray command, which would take the machine for seconds."""
    asked = urllib.request.Request(f"{cluster.dashboard}/api/jobs/")
    asked.add_header("Authorization", f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}")
    deadline = time.monotonic() + UP_S
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=10):
                return
        except OSError:
            log = (cluster.folder / "head.log").read_text()
            assert cluster.nodes["head"].poll() is None and time.monotonic() < deadline, log
        time.sleep(0.5)


def _signal(leader: int, number: int) -> None:
    for pid in session_members(leader):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def end(process: subprocess.Popen[str]) -> None:
    """A command that was started in a session of its own, and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
