"""A ZeRO-3 rank on a CPU that makes two steps and sends its weights. Started by test_plan_reality.py."""

from __future__ import annotations

import json
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import torch
import xxhash

from uniapl import transfer
from uniapl.config import Config, load_config
from uniapl.records import Demonstration, Group, MixedBatch, Prompt, Sample, Score, VersionSpan

HOST = "127.0.0.1"
DEADLINE_S = 120.0
LARGEST_TOKEN = 40_000
MICRO_BATCHES = 2


def main(config: Config) -> dict[str, float]:
    """Bytes: the most that this process held over two steps, and what a broadcast of the first rank sent."""
    from learner.device import local_device, set_threads
    from learner.step import train_step
    from learner.weight_source import ZeroSource
    from learner.zero import build_engine, join_ranks
    from uniapl.policy import load_policy

    rank, device = int(os.environ["RANK"]), local_device(0)
    set_threads(0, config.learner.ranks)
    join_ranks(device, DEADLINE_S)
    policy = load_policy(config.model.path, config.learner.activation_checkpointing, device.attention)
    engine = build_engine(policy, config.learner, config.learner.ranks, local_device(0))
    weights = {"demonstration": 0.5, "preference": 0.4, "adversarial": 0.1, "kl": 0.0}
    for step in range(2):
        train_step(engine, full_rows(config, 2 * step + rank), config, weights, 1e-5, device.torch_device)
    if device.torch_device != "cpu":
        return {"peak": float(torch.cuda.max_memory_allocated())}
    peak, source = peak_bytes(), ZeroSource(engine.module, getattr(torch, config.rollout.dtype))
    return {"peak": peak, "sent": broadcast(source) if rank == 0 else float(sum(0 for _ in source.gather_layers()))}


def full_rows(config: Config, seed: int) -> MixedBatch:
    """Rows that are full to the last token: a group of 4 samples in each, or a demonstration.

    `MICRO_BATCHES` of groups, and one of demonstrations.
    """
    draw = random.Random(seed)
    length = 64
    prompt = config.learner.row_tokens - 4 * length

    def ids(count: int) -> list[int]:
        return [draw.randrange(100, LARGEST_TOKEN) for _ in range(count)]

    groups = []
    for number in range(MICRO_BATCHES * config.learner.micro_batch_rows):
        samples = [
            Sample(ids(length), [-2.0] * length, [VersionSpan(0, length, 0)], "", "stop", Score(float(i % 2), 0.1 * i))
            for i in range(4)
        ]
        groups.append(Group(number, Prompt(str(number), [], ids(prompt)), samples, "a"))
    demonstrations = [
        Demonstration(str(number), ids(prompt), ids(4 * length)) for number in range(config.learner.micro_batch_rows)
    ]
    return MixedBatch(0, groups, demonstrations)  # a step that is diagnosed, where any is


def peak_bytes() -> float:
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) * 1024.0


def broadcast(source: Any) -> float:
    """Send all weights, gathered layer by layer, over gloo to one receiver; the bytes sent, checksums included."""
    store = transfer.open_store(HOST, DEADLINE_S)
    deadline = transfer.Deadline.after(DEADLINE_S)
    layout = layout_of(source)

    def receive() -> int:
        group = transfer.join_group(HOST, store.port, 1, 2, deadline)
        return sum(1 for _ in transfer.receive(group, layout, deadline, xxhash.xxh3_64()))

    with ThreadPoolExecutor(1) as beside:
        received = beside.submit(receive)
        group = transfer.join_group(HOST, store.port, 0, 2, deadline)
        layers = (tensors for _, tensors in source.gather_layers())
        sizes: list[int] = []
        transfer.send(group, layers, deadline, xxhash.xxh3_64(), Event(), count=sizes.append)
        assert received.result() == len(layout.names)
    return float(sum(sizes))


def layout_of(source: Any) -> transfer.Layout:
    meta, bounds = source.metadata(), [0]
    for layer in source.layers():
        bounds.append(bounds[-1] + len(layer))
    return transfer.Layout([m.name for m in meta], [m.dtype for m in meta], [list(m.shape) for m in meta], bounds)


if __name__ == "__main__":
    print(json.dumps(main(load_config(sys.argv[1], sys.argv[2:]))))
