"""Checks of ports: sockets on 127.0.0.1, those of a Ray head here, and the address of a Ray cluster."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from cluster.doctor import Check, Finding

SOCKETS = 64
CONNECT_S = 3.0
HEAD_PORTS = {6379: "--port", 8265: "--dashboard-port", 10001: "--ray-client-server-port"}
"""What `ray start --head` listens on by default, and the option that takes another."""
RAYS = re.compile(r"gcs_server|raylet|dashboard|ray[ :/.]|/ray/")
"""In the command lines of Ray's processes."""
_LISTENING = "0A"


def checks() -> dict[str, Check]:
    """By name, in the order of the table."""
    return {"sockets": sockets, "Ray ports": ray_ports}


def sockets() -> Finding:
    """Ports that a run takes on this machine: each of its processes listens on some of 127.0.0.1."""
    low, high = (int(port) for port in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    opened: list[socket.socket] = []
    try:
        for _ in range(SOCKETS):
            opened.append(socket.create_server(("127.0.0.1", 0)))
        with socket.create_connection(opened[0].getsockname(), timeout=CONNECT_S):
            pass
    except OSError as error:
        told = f"after {len(opened)} sockets on 127.0.0.1: {error.strerror or error}"
        return Finding("sockets", "problem", told, "bring the interface lo up, and end programs that hold its ports")
    finally:
        for one in opened:
            one.close()
    return Finding("sockets", "ok", f"{SOCKETS} free ports on 127.0.0.1, connected; range {low} to {high}")


def ray_ports(ports: dict[int, str] = HEAD_PORTS) -> Finding:
    """Who has the ports of a Ray head; never a problem: a local run takes others, and a head can."""
    holders = {port: holder(port) for port in ports}
    told = [f"{port} {'free' if who is None else f'in use by {who}'}" for port, who in holders.items()]
    others = [port for port, who in holders.items() if who is not None and who != "Ray"]
    head = f"; a head here wants {' and '.join(f'another {ports[port]}' for port in others)}" if others else ""
    return Finding("Ray ports", "ok", ", ".join(told) + head)


def holder(port: int) -> str | None:
    """`Ray`, or the name and process of another program that listens on a port of this machine; None: nobody does."""
    inodes = {inode for table in ("tcp", "tcp6") for inode in _listening(Path("/proc/net") / table, port)}
    if not inodes:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        if any(link in inodes for link in _links(process / "fd")):
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            return "Ray" if RAYS.search(words) else f"{Path(words.split()[0]).name} ({process.name})"
    return "a program of another user"


def _listening(table: Path, port: int) -> list[str]:
    """Sockets that listen on a port, as they are named in /proc/PID/fd."""
    rows = [line.split() for line in table.read_text().splitlines()[1:]] if table.is_file() else []
    return [f"socket:[{row[9]}]" for row in rows if row[3] == _LISTENING and int(row[1].split(":")[1], 16) == port]


def _links(folder: Path) -> list[str]:
    found = []
    try:
        for entry in os.scandir(folder):
            found.append(os.readlink(entry.path))
    except OSError:  # another user's, or just ended
        pass
    return found


def refused(address: str) -> str:
    """Why nothing can be reached at HOST:PORT, nothing if something answers there, or it is no such address."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return ""
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
