"""What one node's learner ranks write of a checkpoint or read again, sent to the object store and fetched by that node.

Runs as Ray tasks: in processes of their own, so that ranks train meanwhile. Imports nothing heavy.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from uniapl.config import Config
from uniapl.shared_paths import node_part
from uniapl.storage import Fingerprint, download_all, upload_all


def on_node(node: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """A reference to what `call` gives on a node; it is not tried again, since it may have done its work."""
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(call).options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote(*arguments)


def send_part(config: Config, node: str, name: str, url: str) -> dict[str, Fingerprint]:
    """Send a node's part to the folder `url`; then all that the node keeps of this run goes.

    Returns:
        what was sent, by name.
    """
    folder = node_part(config, node, name)
    found = upload_all(files_below(folder), url)
    shutil.rmtree(folder.parent, ignore_errors=True)
    return found


def fetch_part(config: Config, node: str, name: str, url: str, files: dict[str, Fingerprint]) -> str | None:
    """Fetch a node's part out of the folder `url`; what is wrong with it, or None.

    Args:
        files: by name, as they were written.
    """
    found = download_all(list(files), url, node_part(config, node, name))
    return next((f"{file} is not what was written" for file in files if found[file] != files[file]), None)


def files_below(folder: Path) -> dict[str, Path]:
    """By name within the folder, in order."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
