"""What the benchmarks share: the work W, and settings in processes of their own."""

from __future__ import annotations

import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

LARGEST_TOKEN = 40_000
"""Token ids are drawn below this, so the model's vocabulary must be larger."""


READY, RESULT = "READY\n", "RESULT "


RESPONSE = 64
"""Tokens of every sample and of every expert response."""


def batch(seed: int, scale: int = 1) -> Any:
    """The work W: 8 prompts x 4 samples x 64 tokens, and 16 demonstrations of 64 tokens; `scale` times as many.

    Lengths are the same for every seed; those of the prompts go from 60 to 110 tokens in even steps.

    Returns:
        a `MixedBatch`.
    """
    from uniapl.records import Demonstration, Group, MixedBatch, Prompt, Sample, Score, VersionSpan

    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(100, LARGEST_TOKEN) for _ in range(length)]

    def prompt(index: int, number: int) -> list[int]:
        return ids(60 + 50 * index // (number - 1))

    groups = []
    for g in range(8 * scale):
        samples = []
        for i in range(4):
            tokens = ids(RESPONSE)
            score = Score(float(i % 2), expert_score=0.1 * i)
            samples.append(Sample(tokens, [-2.0] * len(tokens), [VersionSpan(0, len(tokens), 0)], "", "stop", score))
        groups.append(Group(g, Prompt(str(g), [], prompt(g, 8 * scale)), samples, "a"))
    shown = [Demonstration(str(i), prompt(i, 16 * scale), ids(RESPONSE)) for i in range(16 * scale)]
    return MixedBatch(0, groups, shown)


def timed(step: Callable[[int], Any], steps: int, device: str) -> dict[str, float]:
    """Median seconds and peak memory of `step(i)`, after one call that does not count.

    Every call waits for its turn, see `in_turns`.
    Peak memory in GiB: of the process's resident set on a CPU, of PyTorch's allocator on a GPU.
    """
    times = []
    for i in range(steps + 1):
        print(READY, end="", flush=True)
        sys.stdin.readline()
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
    """Run this benchmark again with `arguments`; see `in_turns`."""
    return in_turns({"": arguments})[""]


def in_turns(ways: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Run this benchmark once for each way, one ZeRO-3 rank each, in the environment of the learner's actor.

    They are there side by side and make their steps by turns, one at a time: a machine that is slower for a while is
    so for all of them.

    Returns:
        what each reported with `report`, by name.

    Raises:
        RuntimeError: one failed; holds the end of what it printed.
    """
    with ExitStack() as stack:
        running = {name: stack.enter_context(_Way(arguments)) for name, arguments in ways.items()}
        found: dict[str, dict[str, Any]] = {}
        while left := [name for name in ways if name not in found]:
            for name in left:
                if result := running[name].turn():
                    found[name] = result
        return found


class _Way:
    """A process that measures; it is ready for its first step when it is made."""

    def __init__(self, arguments: list[str]) -> None:
        from learner.device import cpu_environment

        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        side = {} if torch.cuda.is_available() else cpu_environment()
        paths = {"PYTHONPATH": f"{os.getcwd()}:{os.environ.get('PYTHONPATH', '')}"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, sys.argv[0], *arguments],
            env=side | os.environ | rank | paths,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._until_ready()

    def __enter__(self) -> _Way:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def turn(self) -> dict[str, Any] | None:
        """One step; what was reported after the last."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._until_ready()

    def _until_ready(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line == READY:
                return None
            if line.startswith(RESULT):
                return dict(json.loads(line.removeprefix(RESULT)))
        self._errors.seek(0)
        raise RuntimeError(self._errors.read()[-3000:])


def report(found: dict[str, Any]) -> None:
    """Hand a result to the process that called `in_own_process`."""
    print(RESULT + json.dumps(found), flush=True)
