"""Time and bandwidth of a weight broadcast on CPU against a bare gloo broadcast of the same bytes.

The parameters have the names and shapes of a real model and random values. Sender and receivers are processes of
their own on this machine; they run the wire of `uniapl/transfer.py` with its packing and checksums on both sides, and
in turn, in the same group, bare broadcasts of buckets of the same sizes from and into memory that is there already.
Gathering from ZeRO-3 and loading in vLLM are not part of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import torch
import xxhash

from uniapl import transfer
from uniapl.memory import Memory

HOST = "127.0.0.1"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DEADLINE_S = 300.0


def layout_of(model: Path, dtype: torch.dtype) -> transfer.Layout:
    """One bucket per layer, as the learner sends them; from the header of the model's weights."""
    from learner.weight_source import by_layer

    with (model / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    names = [name for name in header if name != "__metadata__"]
    layers = by_layer(sorted(names))
    ordered = [name for layer in layers for name in layer]
    bounds = [0]
    for layer in layers:
        bounds.append(bounds[-1] + len(layer))
    return transfer.Layout(ordered, [dtype] * len(ordered), [header[n]["shape"] for n in ordered], bounds)


def bucket_sizes(layout: transfer.Layout) -> list[int]:
    return [sum(layout.sizes(*pair)) + transfer.CHECKSUM_BYTES for pair in pairwise(layout.bounds)]


def bare(group: Any, buffers: list[torch.Tensor]) -> None:
    """One plain gloo broadcast per bucket."""
    for buffer in buffers:
        transfer.finish(transfer.broadcast(group, buffer, transfer.Deadline.after(DEADLINE_S)))


def receiver(port: int, rank: int, world_size: int, layout: transfer.Layout, rounds: int) -> None:
    """The other end, in a process of its own."""
    torch.set_num_threads(1)
    deadline = transfer.Deadline.after(DEADLINE_S)
    group = transfer.join_group(HOST, port, rank, world_size, deadline)
    buffers = [torch.zeros(size, dtype=torch.uint8) for size in bucket_sizes(layout)]
    done, memory = torch.zeros(1, dtype=torch.uint8), Memory()
    for _ in range(rounds):
        bare(group, buffers)
        group.allreduce([done]).wait()
        for _name, _tensor in transfer.receive(group, layout, deadline, xxhash.xxh3_64(), memory):
            pass
        group.allreduce([done]).wait()


def measure(layout: transfer.Layout, receivers: int, rounds: int) -> dict[str, Any]:
    """Median seconds of both ways, taken in turn, until every receiver has everything."""
    deadline = transfer.Deadline.after(DEADLINE_S)
    store = transfer.open_store(HOST, DEADLINE_S)
    spawn = multiprocessing.get_context("spawn")
    arguments = (store.port, receivers + 1, layout, rounds)
    others = [spawn.Process(target=receiver, args=(arguments[0], 1 + i, *arguments[1:])) for i in range(receivers)]
    for other in others:
        other.start()
    group = transfer.join_group(HOST, store.port, 0, receivers + 1, deadline)
    tensors = [torch.rand(shape).to(dtype) for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True)]
    layers = [tensors[a:b] for a, b in pairwise(layout.bounds)]
    buffers = [torch.zeros(size, dtype=torch.uint8) for size in bucket_sizes(layout)]
    done, memory = torch.zeros(1, dtype=torch.uint8), Memory()
    times: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(rounds):
        for way, run in (
            ("bare", lambda: bare(group, buffers)),
            ("ours", lambda: transfer.send(group, layers, deadline, xxhash.xxh3_64(), Event(), memory)),
        ):
            began = time.perf_counter()
            run()
            group.allreduce([done]).wait()
            times[way].append(time.perf_counter() - began)
    for other in others:
        other.join()
    size = sum(bucket_sizes(layout))
    found = {way: statistics.median(values[1:]) for way, values in times.items()}
    ratio = statistics.median(o / b for o, b in zip(times["ours"][1:], times["bare"][1:], strict=True))
    return {"bytes": size, "ratio": ratio, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="shapes from here")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--receivers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=8, help="the first does not count")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, median of {args.rounds - 1} rounds")
    print("| dtype | receivers | MB | bare s | ours s | ours MB/s | ours / bare |")
    print("|---|---|---|---|---|---|---|")
    for dtype in args.dtypes:
        layout = layout_of(args.model, DTYPES[dtype])
        for receivers in args.receivers:
            found = measure(layout, receivers, args.rounds)
            size = found["bytes"] / 1e6
            print(
                f"| {dtype} | {receivers} | {size:.0f} | {found['bare']:.3f} | {found['ours']:.3f} "
                f"| {size / found['ours']:.0f} | {found['ratio']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
