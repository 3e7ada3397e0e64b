"""Groups per second through the real queue actor, and what a group costs it, by number of rollout actors.

    python benchmarks/queue_scale.py [--actors 10 100 1000] [--rate 4000] [--seconds 20] [--tokens 64]

The rollout actors are simulated: coroutines that sleep where an engine would sample, in a few processes.
A thousand engines need a thousand machines; what is measured here is the queue, and that is the real one,
called as a rollout actor calls it, with groups of four samples. `--rate` is what all actors together would
make if the queue answered at once: 0 lets them sleep not at all, for the most that gets through.

Of the driver only its calls of the queue and the unpacking of groups are made here. Its metrics, the file of each
batch and its look after lost actors do not depend on the number of actors, and would share two cores with what is
measured; benchmarks/soak.py makes the metrics and the file, too, and tells its seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import time
from typing import Any

import ray

from actors.packed import PackedGroup
from actors.queue import start_queue
from actors.queue_client import QueueClient
from uniapl.config import Config
from uniapl.leases import Lease
from uniapl.records import Demonstration, Group, Prompt, Sample, Score, VersionSpan

HOSTS = 2
"""Processes for the simulated actors."""
IN_FLIGHT = 8
"""Groups that one actor works on at a time, as `rollout.groups_in_flight`."""
STALENESS = 3
SAMPLES = 4
WARM_S = 5.0


class Endless:
    """An endless source of records, each of `tokens` tokens."""

    def __init__(self, make: Any, tokens: int) -> None:
        self.make, self.tokens, self.position = make, tokens, 0

    def next(self) -> Any:
        self.position += 1
        return self.make(str(self.position - 1), self.tokens)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def prompt(name: str, tokens: int) -> Prompt:
    return Prompt(name, [{"role": "user", "content": "say something" * 5}], list(range(tokens)), '{"kind": "none"}')


def demonstration(name: str, tokens: int) -> Demonstration:
    return Demonstration(name, list(range(tokens)), list(range(tokens)))


def packed_group(tokens: int) -> PackedGroup:
    """As large as a real one, and scored."""
    ids, logprobs = list(range(tokens)), [-0.5 - i / 100 for i in range(tokens)]
    spans = [VersionSpan(0, tokens, 0)]
    samples = [
        Sample(ids, logprobs, spans, "some words " * (tokens // 3), "stop", Score(float(i % 2), None, {"check": True}))
        for i in range(SAMPLES)
    ]
    return PackedGroup.of(Group(0, prompt("any", tokens), samples, "any", 1.0, 0.1))


class Host:
    """Simulated rollout actors in one process."""

    def __init__(self, queue: Any, names: list[str], sleep_s: float, tokens: int) -> None:
        self._clients = [QueueClient(queue, name) for name in names]
        self._sleep_s, self._packed = sleep_s, packed_group(tokens)
        self._version = 0
        self._stopping = False
        self._waits: dict[str, list[float]] = {"lease": [], "commit": []}

    async def run(self) -> None:
        await asyncio.gather(*(self._work(client) for client in self._clients for _ in range(IN_FLIGHT)))

    async def stop(self) -> None:
        self._stopping = True

    async def published(self, version: int) -> None:
        self._version = version

    async def cpu_s(self) -> float:
        return time.process_time()

    async def taken(self) -> dict[str, list[float]]:
        """Seconds that each call since the last `taken` waited for the queue."""
        taken, self._waits = self._waits, {"lease": [], "commit": []}
        return taken

    async def _work(self, client: QueueClient) -> None:
        await asyncio.sleep(random.random() * self._sleep_s)
        while not self._stopping:
            lease = await self._timed("lease", client.lease())
            if lease is None:
                continue
            version = self._version
            await asyncio.sleep(self._sleep_s * random.uniform(0.5, 1.5))
            await self._timed("commit", client.commit_packed(self._made(lease, version)))

    def _made(self, lease: Lease, version: int) -> PackedGroup:
        """The group of a lease; packing it is the work of the actor's own machine, which is not measured here."""
        return dataclasses.replace(
            self._packed, lease_id=lease.id, prompt_id=lease.prompt.id, actor=lease.actor, oldest_version=version
        )

    async def _timed(self, name: str, call: Any) -> Any:
        began = time.perf_counter()
        answer = await call
        self._waits[name].append(time.perf_counter() - began)
        return answer


def config_for(groups_per_step: int) -> Config:
    queue = {"groups_per_step": groups_per_step, "demonstrations_per_step": groups_per_step, "max_staleness": STALENESS}
    return Config.model_validate(
        {"model": {"path": "none"}, "data": {"train": ["none"]}, "evaluation": {"prompts": 0}, "queue": queue}
    )


def measure(actors: int, rate: float, seconds: float, tokens: int) -> dict[str, Any]:
    """One setting; the driver's calls are made here, one step after the other, without training."""
    in_flight = actors * IN_FLIGHT
    per_step = max(64, in_flight // 2)  # admission then keeps every actor busy, two steps ahead
    queue = start_queue(config_for(per_step), Endless(prompt, tokens), Endless(demonstration, tokens))
    host = ray.remote(num_cpus=0, max_concurrency=100)(Host)
    names = [f"rollout-{i}" for i in range(actors)]
    sleep_s = in_flight / rate if rate else 0.0
    hosts = [host.remote(queue, names[i::HOSTS], sleep_s, tokens) for i in range(HOSTS)]
    runs = [h.run.remote() for h in hosts]
    waits: list[float] = []
    step = consume(queue, hosts, 0, WARM_S + 2 * sleep_s, waits)
    ray.get([h.taken.remote() for h in hosts])
    waits.clear()
    before, others = ray.get(queue.usage.remote()), others_cpu_s(hosts)
    began, first = time.perf_counter(), step
    step = consume(queue, hosts, step, seconds, waits)
    took = time.perf_counter() - began
    after, others = ray.get(queue.usage.remote()), others_cpu_s(hosts) - others
    taken = ray.get([h.taken.remote() for h in hosts])
    groups = (step - first) * per_step
    stats = ray.get(queue.stats.remote())
    ray.get([h.stop.remote() for h in hosts] + [queue.stop.remote()])
    ray.get(runs)
    for actor in (*hosts, queue):
        ray.kill(actor)
    return {
        "actors": actors,
        "groups_per_step": per_step,
        "groups_per_s": round(groups / took),
        "queue_cpu_us_per_group": round(1e6 * (after["cpu_s"] - before["cpu_s"]) / groups),
        "other_cpu_us_per_group": round(1e6 * others / groups),
        "queue_cpu": round((after["cpu_s"] - before["cpu_s"]) / took, 2),
        "queue_mib": round(after["resident_mib"]),
        **{name: percentiles([w for t in taken for w in t[name]]) for name in ("lease", "commit")},
        "next_batch": percentiles(waits),
        "dropped_stale": stats["dropped_stale"],
    }


def consume(queue: Any, hosts: list[Any], step: int, seconds: float, waits: list[float]) -> int:
    """Take batches for `seconds`, each published at once; returns the next step."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        batch = ray.get(queue.next_batch.remote(60.0))
        waits.append(time.perf_counter() - began)
        groups = [packed.group() for packed in batch.groups]
        if len({packed.lease_id for packed in batch.groups}) != len(groups):
            raise RuntimeError(f"batch {step} holds a group twice")
        step += 1
        ray.get([queue.published.remote(step), *(h.published.remote(step) for h in hosts)])
    return step


def others_cpu_s(hosts: list[Any]) -> float:
    """Processor seconds of the simulated actors and of this process."""
    return time.process_time() + sum(ray.get([h.cpu_s.remote() for h in hosts]))


def percentiles(waits: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(waits) or [float("nan")]
    return {f"p{p}_ms": round(1e3 * ordered[min(len(ordered) * p // 100, len(ordered) - 1)], 1) for p in (50, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rate", type=float, default=4000.0, help="groups per second of all actors; 0: no limit")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=64, help="of each prompt and response")
    a = parser.parse_args()
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=1 << 30, log_to_driver=False)
    for actors in a.actors:
        print(json.dumps(measure(actors, a.rate, a.seconds, a.tokens)), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
