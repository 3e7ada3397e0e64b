"""`uniapl doctor`: what it says of machines that are not fit, and that no check hides another or holds the command.

What a test replaces is what the system says of this machine (disk, limits, packages), or a check itself where one must
break or hang: a test cannot make the machine unfit. Limits on time are shorter, so that nobody waits for them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from helpers_redis import Server, free_port
from helpers_toy import toy_config

from cluster import doctor, doctor_config, doctor_machine, doctor_ports, doctor_torch
from cluster.cli import main
from cluster.doctor import Finding, examine
from uniapl.config import load_config

OLD = time.time() - 3600
MEMINFO = "MemTotal: 8388608 kB\nMemAvailable: {} kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n"
Usage = namedtuple("Usage", "total used free")
GIB = 2**30


def file(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_this_machine_and_a_configuration_within_20_seconds(tmp_path: Path, tiny: Path) -> None:
    """The command as a user runs it, from its start to its end."""
    config = toy_config(tmp_path, tiny, rollout={"kv_cache_gib": 0.1})
    missing = f"redis://127.0.0.1:{free_port()}/0"
    command = [Path(sys.executable).parent / "uniapl", "doctor", config, f"reward.redis_url={missing}", "--json"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert time.monotonic() - began < 20
    told, status = json.loads(done.stdout), done.returncode
    found = {check["check"]: check for check in told["checks"]}
    machine = ["processor", "memory", "shared memory", "disk", "limits", "Python", "packages", "sockets", "Ray ports"]
    assert list(found) == [*machine, "host name", "run.folder", "GPU", "NCCL", "gloo", "plan", "inputs", "Redis"]
    assert found["Redis"]["state"] == found["inputs"]["state"] == "problem"
    assert "reward.redis_url" in found["Redis"]["found"]
    fine = {name for name, check in found.items() if check["state"] == "ok"}
    assert fine >= {"Python", "sockets", "gloo", "NCCL", "plan", "run.folder"}
    assert all(bool(check["advice"]) == (check["state"] != "ok") for check in found.values())
    assert (status, told["problems"]) == (1, sum(check["state"] == "problem" for check in found.values()))


def test_a_check_that_hangs_or_breaks_is_named_and_the_others_are_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "LIMIT_S", 0.3)
    fine = Finding("last", "ok", "here")
    checks: dict[str, Any] = {"broken": lambda: 1 / 0, "last": lambda: fine}
    monkeypatch.setattr(doctor_machine, "checks", lambda: checks)
    monkeypatch.setattr(doctor_torch, "checks", lambda: {"hangs": lambda: time.sleep(5)})
    findings = examine(None)
    assert [(f.check, f.state) for f in findings] == [("broken", "problem"), ("last", "ok"), ("hangs", "warning")]
    assert "ZeroDivisionError" in findings[0].found
    doctor.show(findings, 0.3)
    shown = capsys.readouterr().out
    assert "no answer within 0.3 s" in shown
    assert "1 ok, 1 warning, 1 problem in 0.3 s" in shown


@pytest.mark.parametrize(
    ("flags", "state"),
    [("sse4_2", "problem"), ("avx2", "warning"), ("avx2 avx512f avx512_bf16", "ok"), ("avx2 amx_bf16", "ok")],
)
def test_processor(tmp_path: Path, flags: str, state: str) -> None:
    found = doctor_machine.processor(file(tmp_path / "cpuinfo", f"model name\t: X\nflags\t\t: fpu {flags}\n"))
    assert found.state == state


@pytest.mark.parametrize(
    ("free_gib", "limit", "state"), [(7, "max", "warning"), (3, "max", "problem"), (7, "3221225472", "problem")]
)
def test_memory_within_the_limit_of_the_group(tmp_path: Path, free_gib: int, limit: str, state: str) -> None:
    file(tmp_path / "memory.max", limit)
    file(tmp_path / "memory.current", "0")
    found = doctor_machine.memory(file(tmp_path / "meminfo", MEMINFO.format(free_gib << 20)), tmp_path)
    assert found.state == state


def test_shared_memory_that_a_killed_run_left_is_named_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    shm, proc = tmp_path / "shm", tmp_path / "proc"
    for name in ("psm_left", "psm_held", "deepspeed_allreduce_buffer_x", "psm_new", "somebody_elses"):
        os.utime(file(shm / name, "x"), (OLD, OLD) if name != "psm_new" else None)
    file(proc / "7" / "maps", f"7f00-7f01 rw-s 0 00:1a 5 {shm / 'psm_held'}\n")
    found = doctor_machine.shared_memory(shm, proc, wanted=0.0)
    assert found.state == "warning"
    assert found.advice.endswith(f"rm {shm / 'deepspeed_allreduce_buffer_x'} {shm / 'psm_left'}")
    assert doctor_machine.shared_memory(shm, proc, wanted=1e9).state == "problem"
    assert doctor_machine.shared_memory(tmp_path / "none").advice == "mount a tmpfs at /dev/shm"


def test_a_disk_that_ray_would_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for usage, state in ((Usage(100 * GIB, 96 * GIB, 4 * GIB), "problem"), (Usage(50 * GIB, GIB, GIB), "warning")):
        monkeypatch.setattr("shutil.disk_usage", lambda _, usage=usage: usage)
        assert doctor_machine.disk(tmp_path).state == state


def test_limits_on_files_and_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file(tmp_path / "pids.max", "500")
    monkeypatch.setattr("resource.getrlimit", lambda _: (65536, 65536))
    assert doctor_machine.limits(tmp_path).state == "warning"
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    found = doctor_machine.limits(tmp_path)
    assert (found.state, found.advice) == ("problem", "`ulimit -n 65536` before the run (up to 4096)")


def test_versions_against_the_lock_and_what_the_package_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_machine.packages().state == "ok", "this environment is the lock's"
    file(tmp_path / "cpu.txt", "ray[default,serve]==1.2.3\ntorch==2.13.0+cpu\n")
    found = doctor_machine.packages(tmp_path)
    assert (found.state, "ray 2.60.0 (lock: 1.2.3)" in found.found) == ("warning", True)
    needed = ["deepspeed==0.1", "no-such-package>=2", "torch>1 ; extra == 'gpu'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: needed)
    found = doctor_machine.packages()
    assert found.state == "problem"
    assert found.found == "deepspeed 0.19.8 (needed: ==0.1); no-such-package is missing (needed: >=2)"


def test_the_ports_of_a_ray_head_are_free_rays_or_another_programs() -> None:
    """A program named as Ray's is takes the place of one: who it is, is read from its command line."""
    free = free_port()
    listening = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); "
    programs = [
        subprocess.Popen([sys.executable, "-c", listening + "input()", name], stdin=PIPE, stdout=PIPE, text=True)
        for name in ("other", "/x/ray/core/src/ray/gcs/gcs_server")
    ]
    try:
        others, rays = (int(p.stdout.readline()) for p in programs if p.stdout)
        found = doctor_ports.ray_ports({free: "--a", others: "--b", rays: "--c"})
        who = f"{Path(sys.executable).name} ({programs[0].pid})"
        told = f"{free} free, {others} in use by {who}, {rays} in use by Ray; a head here wants another --b"
        assert (found.state, found.found) == ("ok", told)
    finally:
        for program in programs:
            program.communicate("\n")
    assert list(doctor_ports.HEAD_PORTS) == [6379, 8265, 10001]


def test_without_a_configuration_it_says_what_is_not_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_machine, "checks", dict)
    monkeypatch.setattr(doctor_torch, "checks", dict)
    assert main(["doctor"]) == 0
    assert " ".join(capsys.readouterr().out.split()).endswith("0 s " + doctor.WITH_CONFIG)


def test_an_interface_for_gloo_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    found = doctor_machine.host_name()
    assert found.state == "problem"
    assert "lo" in found.advice


def test_a_driver_without_a_pytorch_for_it(tmp_path: Path) -> None:
    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n"
    found = doctor_torch.gpu(file(tmp_path / "version", version))
    assert (found.state, found.found[:17]) == ("problem", "driver 580.65.06,")
    assert found.advice == "PyTorch is built for CPUs: install requirements/gpu.txt"


def test_what_a_configuration_names(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toy_config(tmp_path, tiny)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(GIB, GIB, 1000))
    found = doctor_config.run_folder(load_config(path))
    assert (found.state, found.advice) == ("problem", "make room, or set run.folder to a larger disk")
    gone = load_config(path, [f"cluster.address=127.0.0.1:{free_port()}"])
    assert doctor_config.asking_checks(gone)["Ray cluster"]().found.endswith(": Connection refused")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        silent = load_config(path, [f"cluster.address=127.0.0.1:{mute.getsockname()[1]}"])
        monkeypatch.setattr(doctor_config, "RAY_S", 0.5)
        assert doctor_config.asking_checks(silent)["Ray cluster"]().found.endswith("no answer within 0.5 s")
    assert doctor_config.inputs(load_config(path, ["data.train=[none.arrow]"])).state == "problem"


def test_redis_that_lets_us_in_and_one_user_who_may_only_read(tmp_path: Path, tiny: Path) -> None:
    limited = ["--user", "reader", "on", "nopass", "~uniapl:score:*", "+mget", "+ping", "+client"]
    server = Server(free_port(), tmp_path, limited)
    server.start()
    try:
        path = toy_config(tmp_path, tiny)
        found = doctor_config.redis(load_config(path, [f"reward.redis_url={server.url}"]))
        assert (found.state, found.found[:25]) == ("ok", "reads and writes scores, "), found
        url = server.url.replace("//", "//reader@")
        found = doctor_config.redis(load_config(path, [f"reward.redis_url={url}"]))
        assert found.state == "problem"
        assert "it refuses: " in found.found
        assert "+set" in found.advice
    finally:
        server.kill()
