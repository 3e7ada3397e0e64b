"""`uniapl report`."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

EXAMPLE = """\
example:
  uniapl report runs/local              # writes runs/local/report.html again
  uniapl report runs/sft runs/grpo      # writes runs/comparison.html"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="write a run's report.html again, or compare several runs",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="RUN", help="such as runs/local; others are compared with the first"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="of the comparison; default: comparison.html beside RUN"
    )
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> None:
    from uniapl.config_errors import ConfigError
    from uniapl.report import write_comparison, write_report

    for folder in arguments.folders:
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder}: holds no config.yaml; allowed: the folder of a run, such as runs/local")
    out = arguments.out
    if out is not None and len(arguments.folders) == 1:
        raise ConfigError(f"--out: got '{out}'; allowed: with two runs or more, one has its own report.html")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"--out: got '{out}'; allowed: a file in a folder that is there")
    if len(arguments.folders) == 1:
        print(f"report: {write_report(arguments.folders[0])}")
    else:
        print(f"comparison: {write_comparison(arguments.folders, out)}")
