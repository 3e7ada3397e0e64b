"""A process that starts a Ray of our own as a run does, says where it is, and ends it when its input ends.

python tests/helpers_own_ray.py
"""

from __future__ import annotations

import json
import os
import sys

import ray

from cluster.ray_session import LOOPBACK, ray_session
from learner.worker import LearnerRank
from uniapl.config import Config


def main() -> None:
    """Prints one line of JSON: address and token of the Ray, its session's folder, an actor's own address, where it
    is and where it looks for modules, and what Ray keeps of its jobs."""
    config = Config.model_validate({"model": {"path": "m"}, "data": {"train": ["t"], "heldout": ["h"]}})
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with ray_session(config):
        rank = ray.remote(LearnerRank).remote(0, config)
        host, _ = ray.get(rank.address.remote())
        seen = {
            "address": ray.get_runtime_context().gcs_address,
            "token": os.environ["RAY_AUTH_TOKEN"],
            "folder": ray._private.worker._global_node.get_session_dir_path(),
            "actor": host,
            "here": ray.get(rank.__ray_call__.remote(lambda _: os.getcwd())),
            "path": ray.get(rank.__ray_call__.remote(lambda _: sys.path)),
            "jobs": str(ray._private.worker.global_worker.gcs_client.get_all_job_info()),
        }
        print(json.dumps(seen), flush=True)
        sys.stdin.read()
    assert os.environ["RAY_AUTH_MODE"] == "disabled" and not {"RAY_AUTH_TOKEN", *LOOPBACK} & os.environ.keys()


if __name__ == "__main__":
    main()
