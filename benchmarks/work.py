"""What the benchmarks share: a batch like that of configs/local.yaml, and settings in processes of their own."""

from __future__ import annotations

import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

LARGEST_TOKEN = 40_000
"""Token ids are drawn below this, so the model's vocabulary must be larger."""


def batch(seed: int, scale: int = 1) -> Any:
    """`scale` times 8 groups of 4 samples of 16 to 64 tokens and 16 demonstrations; prompts of 60 to 110 tokens.

    Returns:
        a `MixedBatch`.
    """
    from uniapl.records import Demonstration, Group, MixedBatch, Prompt, Sample, Score, VersionSpan

    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(100, LARGEST_TOKEN) for _ in range(draw.randint(low, high))]

    groups = []
    for g in range(8 * scale):
        samples = []
        for i in range(4):
            tokens = ids(16, 64)
            score = Score(float(i % 2), expert_score=0.1 * i)
            samples.append(Sample(tokens, [-2.0] * len(tokens), [VersionSpan(0, len(tokens), 0)], "", "stop", score))
        groups.append(Group(g, Prompt(str(g), [], ids(60, 110)), samples, "a"))
    shown = [Demonstration(str(i), ids(60, 110), ids(16, 64)) for i in range(16 * scale)]
    return MixedBatch(0, groups, shown)


def timed(step: Callable[[int], Any], steps: int, device: str) -> dict[str, float]:
    """Median seconds and peak memory of `step(i)`, after one call that does not count.

    Peak memory in GiB: of the process's resident set on a CPU, of PyTorch's allocator on a GPU.
    """
    times = []
    for i in range(steps + 1):
        began = time.perf_counter()
        step(i)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return {"step_s": round(statistics.median(times[1:]), 3), "peak_gib": round(peak_gib(device), 2)}


def peak_gib(device: str) -> float:
    """The most memory this process has held so far."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    with open("/proc/self/status", encoding="ascii") as status:
        [line] = [x for x in status if x.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20


def in_own_process(arguments: list[str]) -> dict[str, Any]:
    """Run this benchmark again with `arguments`, as one ZeRO-3 rank, in the environment of the learner's actor.

    Returns:
        what it reported with `report`.

    Raises:
        RuntimeError: it failed; holds the end of what it printed.
    """
    from learner.device import cpu_environment

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    side = {} if torch.cuda.is_available() else cpu_environment()
    paths = {"PYTHONPATH": f"{os.getcwd()}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, sys.argv[0], *arguments]
    done = subprocess.run(command, env=side | os.environ | rank | paths, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(done.stderr[-3000:])
    return dict(json.loads(lines[-1].removeprefix("RESULT ")))


def report(found: dict[str, Any]) -> None:
    """Hand a result to the process that called `in_own_process`."""
    print("RESULT " + json.dumps(found), flush=True)
