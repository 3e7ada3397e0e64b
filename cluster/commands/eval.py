"""`uniapl eval`."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from cluster.commands.words import dtype, example, stopped, whole


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="score a model or a run on IFEval, IFBench, held-out prompts or a file",
        epilog=example("uniapl eval runs/local --suite ifeval --limit 100"),
    )
    parser.add_argument("target", type=Path, metavar="MODEL_OR_RUN", help="a Hugging Face folder, or a run's")
    parser.add_argument("--suite", required=True, help="ifeval, ifbench, heldout, or a FILE")
    parser.add_argument("--samples", type=whole, default=1, metavar="K", help="of each prompt; default: 1")
    parser.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="default: 0, greedy")
    parser.add_argument("--max-tokens", type=whole, metavar="N", help="of a response; default: 1280")
    parser.add_argument("--limit", type=whole, metavar="N", help="the first N prompts alone")
    parser.add_argument("--seed", type=int, default=0, help="of sampling; default: 0")
    parser.add_argument("--dtype", type=dtype, metavar="TYPE", help="bfloat16 or float32; default: the run's")
    parser.add_argument("--tensor-parallel", type=whole, default=1, metavar="N", help="GPUs of the engine; default: 1")
    parser.add_argument("--reward", metavar="NAME", help="judges instead: math, module:function, ...")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/eval/SUITE-...json")
    parser.add_argument("--json", action="store_true", help="scores as JSON instead of a table")
    parser.set_defaults(run=run)


def _temperature(text: str) -> float:
    if not 0 <= (number := float(text)) <= 10:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: 0 to 10")
    return number


def run(arguments: Namespace) -> int:
    from cluster.evaluate_model import evaluate_model

    try:
        return evaluate_model(arguments)
    except KeyboardInterrupt:
        return stopped()
