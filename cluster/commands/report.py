"""`uniapl report`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser("report", help="write a run's report.html again")
    parser.add_argument("folder", metavar="RUN", help="such as runs/local, or s3://BUCKET/runs/NAME")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> None:
    from uniapl.config_errors import ConfigError
    from uniapl.report import write_report
    from uniapl.storage import is_remote

    if is_remote(arguments.folder):
        from cluster.run_store import write_report_there

        print(f"report: {write_report_there(arguments.folder)}")
        return
    folder = Path(arguments.folder)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: holds no config.yaml; allowed: the folder of a run, such as runs/local")
    print(f"report: {write_report(folder)}")
