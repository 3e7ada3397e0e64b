"""A Ray cluster on this machine whose autoscaler adds nodes, and a fleet that asks for more engines than fit at first.

python tests/helpers_autoscaled.py, with `ENVIRONMENT` and a token in the environment: Ray reads it when it is imported

Nodes come from Ray's own fake provider: every one is a raylet here that claims the resources of cluster/aws.yaml's node
type. Ray's `AutoscalingCluster` is not used, for it calls `ray stop --force`, which ends every Ray on the machine, and
reads a file that Ray's package leaves out. The processes that are started here are ended by their ids.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from helpers_mixing import Counting, demonstration, prompt
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from actors.queue import start_queue
from cluster import fleet as fleet_module
from cluster.autoscaler import autoscaler_limit, open_site
from cluster.fleet import Fleet
from cluster.placement import engine_bundle
from cluster.ray_session import LOOPBACK
from uniapl.config import Config

ROOT = Path(__file__).resolve().parents[1]
FAKE = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
WANTED, NODES = 3, 2
"""Engines that are asked for, and the most nodes, of one GPU each, that the autoscaler may add."""
ENVIRONMENT = LOOPBACK | {
    "RAY_AUTH_MODE": "token",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
WAIT_S = 240.0
"""For a machine with other work, on which a node's processes come up slowly."""


class Simulated:
    """A rollout actor without an engine: what is tried is where actors go, and three engines would not fit here."""

    def __init__(self, name: str, config: Config, gpu: bool) -> None:
        pass

    async def start(self) -> float:
        return 0.0


def main() -> None:
    """Prints one line of JSON: `ray status` before any node was added and afterwards, the nodes, and who is up."""
    fleet_module.RolloutActor = Simulated  # type: ignore[misc,assignment]
    ray.cloudpickle.register_pickle_by_value(sys.modules[Counting.__module__])
    config = Config.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"train": ["unused"]},
            "rollout": {"actors": WANTED, "min_actors": 1},
            "queue": {"groups_per_step": 4, "demonstrations_per_step": 1},
            "evaluation": {"prompts": 0},
        }
    )
    with cluster() as (address, file):
        ray.init(address=address, log_to_driver=False, logging_level="error")
        site = open_site(autoscaler_limit(file))  # no node with a GPU is there yet
        fleet = Fleet(config, site, start_queue(config, Counting(prompt), Counting(demonstration)), print)
        before = status(address)
        fleet.start()
        asked = until(lambda: status(address), lambda text: "{" in demands(text))
        until(lambda: fleet.poll() or len(fleet.up), lambda up: up == NODES)
        after = until(lambda: status(address), lambda text: "{" in demands(text))
        fleet.poll()
        seen = {
            "before": demands(before),
            "asked": demands(asked),
            "after": demands(after),
            "nodes": [node["Resources"] for node in ray.nodes() if node["Alive"]],
            "up": [engine.name for engine in fleet.up],
            "bundle": engine_bundle(config, site),
        }
        ray.shutdown()
    print(json.dumps(seen))


def until(look: Callable[[], Any], there: Callable[[Any], bool]) -> Any:
    """What `look` gives, as soon as it is what is waited for, or after the time that it may take."""
    deadline = time.monotonic() + WAIT_S
    while not there(seen := look()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return seen


def status(address: str) -> str:
    """What `ray status` prints."""
    return subprocess.run([*RAY, "status", "--address", address], capture_output=True, text=True, check=True).stdout


def demands(text: str) -> str:
    """The part of `ray status` that says what is asked for and not there."""
    return text.rpartition("Demands:")[2]


@contextmanager
def cluster() -> Iterator[tuple[str, Path]]:
    """A head with the autoscaler on it; yields its address and its configuration, and ends every process."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    folder = Path(tempfile.mkdtemp(prefix="ray-auto"))
    file = folder / "cluster.json"
    file.write_text(json.dumps(configuration(address)))
    command = [*RAY, "start", "--head", "--block", "--num-cpus=0", "--num-gpus=0"]
    command += [f"--autoscaling-config={file}", f"--port={address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1"]
    command += ["--include-dashboard=false", "--object-store-memory=100000000", f"--temp-dir={folder}"]
    mine = {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
    with (folder / "start.log").open("w") as log:
        head = psutil.Popen(command, env=os.environ | mine, stdout=log, stderr=log)
    try:
        until(lambda: answers(address), lambda up: up)
        yield address, file
    finally:
        processes = [head, *head.children(recursive=True)]
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def configuration(address: str) -> dict[str, Any]:
    """That of cluster/aws.yaml, less the nodes that this trial has no part in."""
    config = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text(encoding="utf-8"))
    config["provider"] = {
        "type": "external",
        "module": FAKE,
        "gcs_address": address,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "use_node_id_as_ip": True,  # all nodes have one address
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    config |= {"file_mounts": {}, "cluster_synced_files": []}
    types = config["available_node_types"]
    for name, most in {"learner": 0, "rollout": NODES, "reward": 0}.items():
        types[name] |= {"min_workers": 0, "max_workers": most}
    types["rollout"]["resources"]["object_store_memory"] = 100_000_000
    types["ray.head.default"] = types.pop("head")  # the fake provider's name for it
    return config | {"head_node_type": "ray.head.default"}


def answers(address: str) -> bool:
    return subprocess.run([*RAY, "status", "--address", address], capture_output=True).returncode == 0


if __name__ == "__main__":
    main()
