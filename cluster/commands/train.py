"""`uniapl train`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from cluster.commands.words import add_config, example


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train as a configuration says",
        epilog=example("uniapl train configs/local.yaml -m grpo run.name=first run.steps=5"),
    )
    add_config(parser, "run.steps=5 learner.ranks=2", "a YAML file, such as configs/local.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run's folder")
    parser.add_argument(
        "--debug", action="store_true", help="one part of each kind, in turn; all logs; breakpoint() waits"
    )
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> None:
    from uniapl.config import load_config

    overrides = arguments.overrides
    if arguments.debug:
        from cluster import debug

        debug.prepare()
        overrides = [*debug.OVERRIDES, *overrides]
    config = load_config(arguments.config, overrides, arguments.method)
    from cluster.checkpoints import full_disk_told
    from cluster.driver import train

    with full_disk_told(config.run_dir):
        report = train(config, arguments.resume, arguments.debug)
    print(f"report: {report}")
