"""`uniapl replay`."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cluster.commands.words import example, whole


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "replay",
        help="make one recorded step again, in this process alone",
        epilog=example("uniapl replay runs/local 13 objective.kl.weight=0.1"),
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="such as runs/local")
    parser.add_argument("step", type=whole, metavar="STEP", help="from 1, as in metrics.jsonl")
    parser.add_argument("override", nargs="?", metavar="KEY=VALUE", help="make it once more with this value")
    parser.add_argument("--pdb", action="store_true", help="stop in Python's debugger before the step")
    parser.add_argument("--failed", action="store_true", help="the batch in failed/ where the step was made later")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    import json

    from cluster.replay import replay
    from cluster.replay_show import as_json, show_replay

    a = arguments
    with _all_to_stderr() if a.json else nullcontext():
        found = replay(a.folder, a.step, a.override, a.failed, a.pdb, lambda line: print(line, file=sys.stderr))
    if a.json:
        print(json.dumps(as_json(found, a.override)))
    else:
        show_replay(found, a.override)
    return 0 if found.reproduced else 1


@contextmanager
def _all_to_stderr() -> Iterator[None]:
    """Whatever is printed inside of the block, which is not JSON: DeepSpeed's warnings go to standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
