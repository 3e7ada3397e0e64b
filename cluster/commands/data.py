"""`uniapl data`: the local model and data set."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from cluster.commands.words import example

DATA_FOLDER = Path("data/local")
MODEL_FOLDER = Path("models/SmolLM2-135M-Instruct")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "data", help="the local model and data set", epilog=example("uniapl data prepare --out data/mine")
    )
    parts = parser.add_subparsers(required=True, metavar="WHAT")
    model = parts.add_parser(
        "model", help="convert the packaged SmolLM2 into a Hugging Face folder", epilog=example("uniapl data model")
    )
    model.add_argument("--out", type=Path, default=MODEL_FOLDER)
    model.set_defaults(run=run_model)
    prepare = parts.add_parser(
        "prepare", help="build the local data set again", epilog=example("uniapl data prepare --seed 1")
    )
    prepare.add_argument("--out", type=Path, default=DATA_FOLDER)
    prepare.add_argument("--model", type=Path, default=MODEL_FOLDER, help="whose tokenizer and samples are used")
    prepare.add_argument("--seed", type=int, default=0)
    prepare.add_argument("--record", action="store_true", help="sample the plain responses anew, with vLLM")
    prepare.set_defaults(run=run_prepare)


def run_model(arguments: Namespace) -> None:
    from uniapl.data.local_model import prepare_model

    print(f"model: {prepare_model(arguments.out)}")


def run_prepare(arguments: Namespace) -> None:
    from actors.sample import sample_responses
    from uniapl.data.local_dataset import prepare

    print(prepare(arguments.out, arguments.model, arguments.seed, arguments.record, sample_responses))
