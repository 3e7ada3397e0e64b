"""`uniapl export`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from cluster.commands.words import add_json, dtype, example, stopped, tell


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="a checkpoint as a Hugging Face folder, on one machine, without Ray",
        epilog=example("uniapl export runs/local --step 20 --out models/local-20"),
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="such as runs/local")
    parser.add_argument("--step", default="newest", metavar="N", help="of a checkpoint; default: newest")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/export/step-N")
    parser.add_argument("--dtype", type=dtype, metavar="TYPE", help="bfloat16 or float32; default: the learner's")
    add_json(parser, "where it is, as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    from cluster.export import export_checkpoint

    a = arguments
    try:
        tell(a.json, {"model": str(export_checkpoint(a.folder, a.step, a.out, a.dtype))})
    except KeyboardInterrupt:
        return stopped()
    return 0
