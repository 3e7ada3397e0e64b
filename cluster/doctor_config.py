"""Checks of what a configuration names: memory, model and data, disk, Redis, the Ray cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from cluster import checkpoints
from cluster.doctor import Check, Finding
from cluster.doctor_machine import GIB, shared_memory
from cluster.doctor_ports import refused
from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.data.errors import DataError
from uniapl.runlog import RunError

RAY_S = 15.0
ASK_RAY = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
nodes = [n for n in ray.nodes() if n["Alive"]]
total = ray.cluster_resources()
print(f"{len(nodes)} nodes, {total.get('CPU', 0):g} CPU, {total.get('GPU', 0):g} GPU")
"""
"""In a process of its own: a cluster that does not answer would hold this one."""


def quick_checks(config: Config) -> dict[str, Check]:
    """By name, in the order of the table."""
    return {"shared memory": lambda: _store(config), "run.folder": lambda: run_folder(config)}


def heavy_checks(config: Config) -> dict[str, Check]:
    """Those that import PyTorch or transformers."""
    return {"plan": lambda: plan(config), "inputs": lambda: inputs(config)}


def asking_checks(config: Config) -> dict[str, Check]:
    """Those that wait for somebody's answer."""
    found: dict[str, Check] = {}
    if config.reward.redis_url is not None:
        found["Redis"] = lambda: redis(config)
    if config.cluster.address != "local":
        found["Ray cluster"] = lambda: ray_cluster(config)
    return found


def _store(config: Config) -> Finding:
    """Ray keeps its store in /dev/shm; vLLM and PyTorch want some beside it."""
    return shared_memory(wanted=config.cluster.object_store_gib + 0.25)


def run_folder(config: Config) -> Finding:
    """Whether it can be written, and holds the checkpoints that stay."""
    place = config.run_dir.absolute()
    there = next(p for p in (place, *place.parents) if p.is_dir())
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding("run.folder", "problem", f"{there} cannot be written", "set run.folder to a folder of yours")
    one = checkpoints.estimated_size([config.model.path])
    kept = (config.run.keep_last + 1) * one
    free = shutil.disk_usage(there).free
    told = f"{free / GIB:.1f} GiB free in {there}; a checkpoint takes {one / GIB:.1f} GiB"
    if free < one:
        return Finding("run.folder", "problem", told, "make room, or set run.folder to a larger disk")
    if free < kept:
        advice = f"run.keep_last and the one being written need {kept / GIB:.1f} GiB: make room, or lower run.keep_last"
        return Finding("run.folder", "warning", told, advice)
    return Finding("run.folder", "ok", told)


def plan(config: Config) -> Finding:
    """Whether the run fits on this machine by `uniapl plan`; of clusters that command asks."""
    import torch

    from uniapl.plan.fit import Machines
    from uniapl.plan.pace import Rates
    from uniapl.plan.plan import make_plan

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    size = torch.cuda.get_device_properties(0).total_memory / GIB if gpus else 80.0
    if config.cluster.address != "local":
        return Finding("plan", "ok", "not of this machine alone: see `uniapl plan CONFIG`")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    try:
        made = make_plan(config, Machines(gpus, max(1, gpus), size, memory), Rates())
    except (ConfigError, RunError) as error:
        return Finding("plan", "problem", _one_line(error), "see `uniapl plan CONFIG`")
    if made.misfits:
        return Finding("plan", "problem", "; ".join(map(str, made.misfits)), "see `uniapl plan CONFIG`")
    learner, engine = made.learner_bytes * made.ranks / GIB, made.engine
    told = f"learner {learner:.1f} GiB" + (f", {made.engines} engines" if engine else "")
    return Finding("plan", "ok", f"fits: {told}")


def inputs(config: Config) -> Finding:
    """What `uniapl train` checks before it starts: model, data, rewards, Redis, discriminator."""
    from cluster.preflight import preflight

    try:
        heldout = preflight(config)
    except (ConfigError, DataError, RunError) as error:
        return Finding("inputs", "problem", _one_line(error), "mend what is named: `uniapl train` would say the same")
    return Finding("inputs", "ok", f"model, data and rewards are there; {len(heldout)} held-out prompts")


def redis(config: Config) -> Finding:
    """Whether the server lets us in, over TLS where the address says so, and read and write scores."""
    from uniapl.rewards.cache import probe_redis

    try:
        took = probe_redis(config.reward.redis_url or "")
    except ConfigError as error:
        advice = "start it, or mend address, UNIAPL_REDIS_PASSWORD or the user's ACL (~uniapl:score:* +ping +mget +set)"
        return Finding("Redis", "problem", str(error), advice)
    return Finding("Redis", "ok", f"reads and writes scores, {took * 1000:.1f} ms")


def ray_cluster(config: Config) -> Finding:
    """Whether Ray answers at `cluster.address`, and what it has."""
    address = config.cluster.address
    if why := refused(address):
        return Finding("Ray cluster", "problem", f"{address}: {why}", _RAY_ADVICE)
    try:
        asked = subprocess.run(  # noqa: S603 (this program)
            [sys.executable, "-P", "-c", ASK_RAY, address], capture_output=True, text=True, timeout=RAY_S
        )
    except subprocess.TimeoutExpired:
        return Finding("Ray cluster", "problem", f"{address}: no answer within {RAY_S:g} s", _RAY_ADVICE)
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["no reason"])[-1][:200]
        return Finding("Ray cluster", "problem", f"{address}: {reason}", _RAY_ADVICE)
    return Finding("Ray cluster", "ok", f"{address}: {asked.stdout.strip()}")


_RAY_ADVICE = "`ray status` on its head tells whether it runs; address, RAY_AUTH_TOKEN and Ray's version must match"


def _one_line(error: Exception) -> str:
    return "; ".join(str(error).splitlines())
