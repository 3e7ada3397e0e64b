"""`uniapl submit`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from cluster.commands.words import add_config, add_json, example


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "submit",
        help="train as a job on a Ray cluster",
        epilog=example("uniapl submit configs/qwen3-4b.yaml run.folder=/shared/runs"),
    )
    add_config(parser, "run.folder=/shared/runs", "a YAML file below the current folder")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run's folder")
    parser.add_argument("--address", metavar="URL", help="of the cluster's dashboard, such as http://127.0.0.1:8265")
    parser.add_argument("--no-wait", action="store_true", help="come back at once; the job goes on")
    add_json(parser, "the job's id as one JSON object; the rest to stderr")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    from cluster.submit import submit

    a = arguments
    return submit(a.config, a.overrides, a.methods, a.resume, a.address, not a.no_wait, a.json)
