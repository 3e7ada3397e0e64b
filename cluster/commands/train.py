"""`uniapl train`."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
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


def run(arguments: Namespace) -> int:
    from uniapl.config import load_config

    overrides = arguments.overrides
    if arguments.debug:
        from cluster import debug

        debug.prepare()
        overrides = [*debug.OVERRIDES, *overrides]
    config = load_config(arguments.config, overrides, arguments.method)
    from uniapl.imports import importing

    with importing():
        from cluster.checkpoints import full_disk_told
        from cluster.driver import train
        from cluster.signals import Terminated
    try:
        with full_disk_told(config.run_dir):
            report = train(config, arguments.resume, arguments.debug)
    except Terminated as end:
        _tell("ended by SIGTERM" + (f" ({end})" if str(end) else ""), config.run_dir)
        return 0
    except KeyboardInterrupt:
        _tell("stopped by Ctrl-C", config.run_dir)
        return 130
    print(f"report: {report}")
    return 0


def _tell(how: str, folder: Path) -> None:
    from cluster.checkpoints import kept

    print(f"{how}; {kept(folder)}", file=sys.stderr)
