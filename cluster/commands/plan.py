"""`uniapl plan`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from cluster.commands.words import add_config, count, example, positive, whole


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a run will need, by arithmetic alone; status 1: does not fit",
        epilog=example("uniapl plan configs/qwen3-4b.yaml --gpus 8 --gpu-memory 80"),
    )
    add_config(parser, "learner.ranks=8", "a YAML file; of models only config.json is read")
    parser.add_argument("--gpus", type=count, metavar="N", help="there are; 0: CPUs alone; default: as many as needed")
    parser.add_argument("--node-gpus", type=whole, default=8, metavar="N", help="GPUs of one node; default: 8")
    parser.add_argument("--gpu-memory", type=positive, default=80, metavar="GIB", help="of one GPU; default: 80")
    parser.add_argument("--node-memory", type=positive, metavar="GIB", help="of one node with GPUs; else not compared")
    parser.add_argument("--bandwidth", type=positive, metavar="GB/S", help="of a broadcast")
    parser.add_argument("--generate-tokens-per-s", type=positive, metavar="X", help="of all engines together")
    parser.add_argument("--train-tokens-per-s", type=positive, metavar="X", help="of all learner ranks together")
    parser.add_argument("--run", type=Path, metavar="RUN", dest="measured", help="a run whose rates to take")
    parser.add_argument("--json", action="store_true", help="every figure, in bytes, tokens and seconds")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    from uniapl.config import load_config
    from uniapl.plan.command import run as run_plan

    config = load_config(arguments.config, arguments.overrides, arguments.methods)
    return run_plan(config, arguments)
