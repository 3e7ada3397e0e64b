"""`uniapl doctor`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from cluster.commands.words import add_config, example


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this machine, and what a configuration names",
        epilog=example("uniapl doctor configs/local.yaml"),
    )
    add_config(parser, "learner.ranks=2", "a YAML file; without one, the machine alone", optional=True)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    import json
    import os
    import sys
    import time

    began = time.monotonic()
    from cluster.doctor import WITH_CONFIG, as_json, examine, show
    from uniapl.config import load_config

    a = arguments
    config = load_config(a.config, a.overrides, a.methods) if a.config else None
    findings = examine(config, began)
    if a.json:
        print(json.dumps(as_json(findings, time.monotonic() - began), indent=1))
    else:
        show(findings, time.monotonic() - began, "" if config else WITH_CONFIG)
    sys.stdout.flush()
    status = int(any(f.state == "problem" for f in findings))
    if any(f.found.startswith("no answer within") for f in findings):
        os._exit(status)  # a check that hangs must not hold the command
    return status
