"""`uniapl doctor`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="check this machine, and what a configuration names")
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="such as configs/local.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as learner.ranks=2")
    parser.add_argument("-m", "--method", help="a file in CONFIG's methods/ folder, such as sft, or a path")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    import json
    import os
    import sys
    import time

    from cluster.doctor import as_json, examine, show
    from uniapl.config import load_config

    a, began = arguments, time.monotonic()
    config = load_config(a.config, a.overrides, a.method) if a.config else None
    findings = examine(config)
    if a.json:
        print(json.dumps(as_json(findings, time.monotonic() - began), indent=1))
    else:
        show(findings, time.monotonic() - began)
    sys.stdout.flush()
    status = int(any(f.state == "problem" for f in findings))
    if any(f.found.startswith("no answer within") for f in findings):
        os._exit(status)  # a check that hangs must not hold the command
    return status
