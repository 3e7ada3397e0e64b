"""`uniapl watch`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from cluster.commands.words import example


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "watch", help="the live table of a run that goes on elsewhere", epilog=example("uniapl watch runs/local --json")
    )
    parser.add_argument("place", metavar="RUN|ADDRESS", help="a run's folder or its URL in a store, or a dashboard")
    parser.add_argument("run_folder", nargs="?", metavar="FOLDER", help="on the cluster; else that of the newest run")
    parser.add_argument("--json", action="store_true", help="one JSON object for each step")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    from cluster.watch import watch

    return watch(arguments.place, arguments.run_folder, arguments.json)
