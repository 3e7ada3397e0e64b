"""`uniapl report`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from cluster.commands.words import add_json, example, tell


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="write a run's report.html again, or compare several runs",
        epilog=example("uniapl report runs/sft runs/grpo runs/uniapl  # writes runs/comparison.html"),
    )
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="RUN",
        help="such as runs/local, s3://BUCKET/runs/NAME; others are compared with the first",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="of the comparison; default: comparison.html beside RUN"
    )
    add_json(parser, "where it is, as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> None:
    from uniapl.config_errors import ConfigError
    from uniapl.report import write_comparison, write_report
    from uniapl.storage import is_remote

    if len(arguments.folders) == 1 and is_remote(arguments.folders[0]):
        from cluster.run_store import write_report_there

        tell(arguments.json, {"report": write_report_there(arguments.folders[0])})
        return
    folders = [Path(folder) for folder in arguments.folders]
    for name, folder in zip(arguments.folders, folders, strict=True):
        if is_remote(name):
            raise ConfigError(f"{name}: cannot be compared where it is; allowed: the folder of a run copied here")
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder}: holds no config.yaml; allowed: the folder of a run, such as runs/local")
    out = arguments.out
    if out is not None and len(folders) == 1:
        raise ConfigError(f"--out: got '{out}'; allowed: with two runs or more, one has its own report.html")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"--out: got '{out}'; allowed: a file in a folder that is there")
    if len(folders) == 1:
        tell(arguments.json, {"report": str(write_report(folders[0]))})
    else:
        tell(arguments.json, {"comparison": str(write_comparison(folders, out))})
