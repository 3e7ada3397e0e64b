"""`uniapl train`."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from cluster.commands.words import add_config, example

if TYPE_CHECKING:
    from cluster.signals import Signals


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
    from cluster.signals import Signals, Terminated

    signals = Signals()
    try:
        with signals:
            report = _train(arguments, signals)
    except Terminated as end:
        print(f"ended by SIGTERM{f' ({end})' if str(end) else ''}; {signals.kept()}", file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        print(f"stopped by Ctrl-C; {signals.kept()}", file=sys.stderr)
        return 130
    print(f"report: {report}")
    return 0


def _train(arguments: Namespace, signals: Signals) -> str:
    """Imports are held: some libraries take whatever ends one for a module that is not there."""
    with signals.held():
        from cluster.checkpoints import full_disk_told, kept
        from uniapl.config import load_config
        from uniapl.imports import importing
    overrides = arguments.overrides
    if arguments.debug:
        from cluster import debug

        debug.prepare()
        overrides = [*debug.OVERRIDES, *overrides]
    config = load_config(arguments.config, overrides, arguments.methods)
    signals.bound(config.run.grace_seconds, lambda: kept(config.run_dir))
    with signals.held(), importing():
        from cluster.driver import train
    with full_disk_told(config.run_dir):
        return train(config, signals, arguments.resume, arguments.debug)
