"""Memory of driver, queue and object store over many small steps: nothing may grow.

    python benchmarks/soak.py [--steps 2000] [--every 100] [--actors 8] [--tokens 128] [--bound 8]

The real queue actor, simulated rollout actors (see queue_scale.py), and the driver's loop around the queue: take
a batch, unpack its groups, compute their metrics, keep the batch in one file, publish. One JSON line every
`--every` steps, the first after as many, when everything has been used once. Ends with status 1 where any of the
three grew by more than `--bound` MiB in the second half of the steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.ipc
import ray
from queue_scale import HOSTS, Endless, Host, config_for, demonstration, prompt

from actors.queue import resident_mib, start_queue
from uniapl.config import ObjectiveConfig
from uniapl.metrics import batch_metrics
from uniapl.objective_config import TERMS
from uniapl.records import MixedBatch, batch_table

GROUPS_PER_STEP = 32


def one_step(queue: Any, hosts: list[Any], step: int, file: Path) -> None:
    """What `cluster.step.one_step` does with a batch, less the training."""
    taken = ray.get(queue.next_batch.remote(60.0))
    batch = MixedBatch(step, [packed.group() for packed in taken.groups], taken.demonstrations)
    batch_metrics(batch, ObjectiveConfig(), dict.fromkeys(TERMS, 0.0))
    table = batch_table(batch)
    with pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    ray.get([queue.published.remote(step + 1), *(host.published.remote(step + 1) for host in hosts)])


def memory(queue: Any) -> dict[str, float]:
    """MiB."""
    total, free = (r.get("object_store_memory", 0.0) for r in (ray.cluster_resources(), ray.available_resources()))
    return {
        "driver_mib": round(resident_mib(), 1),
        "queue_mib": round(ray.get(queue.usage.remote())["resident_mib"], 1),
        "object_store_mib": round((total - free) / 2**20, 1),
    }


def grown(rows: list[dict[str, float]], bound: float) -> list[str]:
    """What grew by more than `bound` MiB between the middle row and the last one."""
    half, last = rows[(len(rows) - 1) // 2], rows[-1]
    changes = {key: last[key] - half[key] for key in last if key.endswith("_mib")}
    span = f"from step {half['step']:g} to {last['step']:g}"
    return [f"{key} grew by {more:.1f} {span}; allowed: <= {bound:g}" for key, more in changes.items() if more > bound]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--actors", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of each prompt and response")
    parser.add_argument("--bound", type=float, default=8.0, help="MiB of growth over the second half, at most")
    a = parser.parse_args()
    if a.steps < 2 * a.every:
        parser.error("--steps: at least twice --every")
    rows: list[dict[str, float]] = []
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=512 << 20, log_to_driver=False)
    queue = start_queue(config_for(GROUPS_PER_STEP), Endless(prompt, a.tokens), Endless(demonstration, a.tokens))
    host = ray.remote(num_cpus=0, max_concurrency=100)(Host)
    names = [f"rollout-{i}" for i in range(a.actors)]
    hosts = [host.remote(queue, names[i::HOSTS], 0.0, a.tokens) for i in range(HOSTS)]
    runs = [h.run.remote() for h in hosts]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for step in range(a.steps):
            one_step(queue, hosts, step, Path(folder) / "batch.arrow")
            if (step + 1) % a.every == 0:
                ray.get([h.taken.remote() for h in hosts])  # their record of waiting times is not the system's
                seconds = round(time.perf_counter() - began, 1)
                rows.append({"step": step + 1, **memory(queue), "s": seconds})
                print(json.dumps(rows[-1]), flush=True)
    stats = ray.get(queue.stats.remote())
    ray.get([h.stop.remote() for h in hosts] + [queue.stop.remote()])
    ray.get(runs)
    print(json.dumps({k: stats[k] for k in ("leased", "committed", "consumed", "dropped_stale", "ready", "open")}))
    ray.shutdown()
    if found := grown(rows, a.bound):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
