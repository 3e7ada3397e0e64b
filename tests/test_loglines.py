"""Log lines of a run's processes: where they come from stands in each."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import helpers_mixing
import ray
from helpers_mixing import Counting, prompt
from helpers_queue import commit_one, lease_of, make_group, taken

from actors.queue import start_queue
from uniapl.config import Config

LINES = """
import logging
from uniapl.loglines import log_lines
logging.getLogger("before").warning("early")
lines = log_lines("local", "rollout-0")
logging.getLogger("actors.rollout").warning("no step yet")
lines.step = 3
logging.getLogger("actors.rollout").warning("lease %d", 7)
logging.getLogger("anybody").info("too quiet")
log_lines("other", "rollout-1")
logging.getLogger("actors.rollout").error("still the first")
"""


def test_every_line_begins_with_time_run_step_and_actor() -> None:
    out = subprocess.run([sys.executable, "-c", LINES], capture_output=True, text=True, check=True)
    early, *lines = out.stderr.splitlines()
    assert early == "early"
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", line) for line in lines)
    assert [line.split(" ", 2)[2] for line in lines] == [
        "WARNING run=local step=- actor=rollout-0 actors.rollout: no step yet",
        "WARNING run=local step=3 actor=rollout-0 actors.rollout: lease 7",
        "ERROR run=local step=3 actor=rollout-0 actors.rollout: still the first",
    ]


def test_what_the_queue_refuses_stands_in_rays_log_with_run_and_step(ray_session: Any) -> None:
    ray.cloudpickle.register_pickle_by_value(helpers_mixing)  # tests/ is not on the path of Ray's workers
    config = Config.model_validate(
        {
            "run": {"name": "told"},
            "model": {"path": "unused"},
            "data": {"train": ["unused"]},
            "queue": {"groups_per_step": 1, "demonstrations_per_step": 1},
            "evaluation": {"prompts": 0},
        }
    )
    queue = start_queue(config, Counting(prompt), Counting(helpers_mixing.demonstration))
    try:
        commit_one(queue)
        assert ray.get(queue.next_batch.remote(60.0)) is not None
        ray.get(queue.published.remote(1))
        lease = lease_of(queue)
        assert taken(queue, make_group(lease, version=1))
        assert not taken(queue, make_group(lease, version=1))
        logs = Path(ray._private.worker._global_node.get_logs_dir_path())
        assert f"run=told step=2 actor=queue actors.queue: lease {lease.id} of a refused: " in written(logs)
    finally:
        ray.kill(queue)


def written(logs: Path, seconds: float = 20.0) -> str:
    """What workers wrote to stderr, as soon as our line is among it."""
    deadline = time.monotonic() + seconds
    while True:
        text = "".join(path.read_text(errors="replace") for path in logs.glob("worker-*.err"))
        if "run=told" in text or time.monotonic() > deadline:
            return text
        time.sleep(0.2)
