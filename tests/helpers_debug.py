"""The three overrides with which docs/cluster.md has a recipe for a cluster debugged on one machine."""

from __future__ import annotations

import json
from pathlib import Path

from helpers_cli import ROOT
from helpers_toy import write_shard

ONE_MACHINE = str(ROOT / "configs/debug/one-machine.yaml")
LOCAL_DATA = str(ROOT / "configs/debug/local-data.yaml")
DEBUG_DATA = ["those of make run", "own"]


def debug_overrides(data: str, model: Path, folder: Path) -> tuple[list[str], list[str]]:
    """What `-m` and `KEY=VALUE` name: sizes, model, and data of `DEBUG_DATA`; own ones are written into `folder`."""
    if data != "own":
        return [ONE_MACHINE, LOCAL_DATA], [f"model.path={model}"]
    rows = [
        {
            "id": f"sum-{i}",
            "messages": [{"role": "user", "content": f"What is {i} + {i}?"}],
            "response": f"Adding {i} to {i} gives \\boxed{{{2 * i}}}.",
            "verifier": json.dumps({"answer": str(2 * i)}),
        }
        for i in range(64)
    ]
    return [ONE_MACHINE], [f"model.path={model}", f"data.train=[{write_shard(folder / 'sums.arrow', rows)}]"]
