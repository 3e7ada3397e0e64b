"""`uniapl report`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from cluster.commands.words import example


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "report", help="write a run's report.html again", epilog=example("uniapl report runs/local")
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="such as runs/local")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> None:
    from uniapl.config_errors import ConfigError
    from uniapl.report import write_report

    if not (arguments.folder / "config.yaml").is_file():
        raise ConfigError(f"{arguments.folder}: holds no config.yaml; allowed: the folder of a run, such as runs/local")
    print(f"report: {write_report(arguments.folder)}")
