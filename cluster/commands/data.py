"""`uniapl data`: the user's own data as shards, and the local model and data set."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from cluster.commands.words import add_json, count, example, whole

DATA_FOLDER = Path("data/local")
MODEL_FOLDER = Path("models/SmolLM2-135M-Instruct")
FORMATS = ("chat", "sharegpt", "alpaca", "preference", "plain", "shard")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "data",
        help="your own data as shards; the local model and data set",
        epilog=example("uniapl data import chats.jsonl --out data/mine"),
    )
    parts = parser.add_subparsers(required=True, metavar="WHAT")
    _add_import(parts)
    _add_inspect(parts)
    model = parts.add_parser(
        "model", help="convert the packaged SmolLM2 into a Hugging Face folder", epilog=example("uniapl data model")
    )
    model.add_argument("--out", type=Path, default=MODEL_FOLDER)
    model.set_defaults(run=run_model)
    prepare = parts.add_parser("prepare", help="build the local data set again", epilog=example("uniapl data prepare"))
    prepare.add_argument("--out", type=Path, default=DATA_FOLDER)
    prepare.add_argument("--model", type=Path, default=MODEL_FOLDER, help="whose tokenizer and samples are used")
    prepare.add_argument("--seed", type=int, default=0)
    prepare.add_argument("--record", action="store_true", help="sample the plain responses anew, with vLLM")
    prepare.set_defaults(run=run_prepare)


def _add_import(parts: Any) -> None:
    parser = parts.add_parser(
        "import",
        help="JSONL, JSON, CSV, Parquet, Arrow or hf: data into shards",
        epilog=example("uniapl data import chats.jsonl --out data/mine --heldout 200"),
    )
    option = parser.add_argument
    option("inputs", nargs="+", metavar="INPUT", help="files, globs, or hf:NAME[:SPLIT[:CONFIG]]")
    option("--out", type=Path, required=True, metavar="FOLDER", help="for train-*.arrow and manifest.json")
    option("--format", choices=FORMATS, metavar="NAME", help="chat sharegpt alpaca preference plain shard")
    option("--prompt", metavar="COLUMN", help="of texts or message lists (format plain)")
    option("--response", metavar="COLUMN", help="likewise; null: the row is a prompt alone")
    option("--verifier", metavar="[X=]COLUMN", help="for rewards: JSON, or X: answer, number")
    option(
        "--on-bad-row", choices=("error", "skip"), default="error", metavar="WHAT", help="error or skip; default: error"
    )
    option("--heldout", type=count, default=0, metavar="N", help="prompts kept out of training")
    option("--shards", type=whole, metavar="N", help="so many training shards")
    option("--rows-per-shard", type=whole, default=50_000, metavar="N", help="default: 50000")
    option("--model", metavar="FOLDER", help="whose tokens the next option counts")
    option("--max-response-tokens", type=whole, metavar="N", help="leave out longer responses")
    option("--overwrite", action="store_true", help="remove what was imported before")
    add_json(parser, "what became of the rows, as one JSON object")
    parser.set_defaults(run=run_import)


def _add_inspect(parts: Any) -> None:
    parser = parts.add_parser(
        "inspect",
        help="schema, counts, lengths, duplicates and rows of shards",
        epilog=example("uniapl data inspect 'data/mine/*.arrow' --model models/Qwen3-0.6B"),
    )
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="files or globs, also of comparisons")
    parser.add_argument("--model", metavar="FOLDER", help="count its tokens, and show rows as it will see them")
    parser.add_argument("--rows", type=count, default=2, metavar="N", help="rows to show; default: 2")
    add_json(parser)
    parser.set_defaults(run=run_inspect)


def run_import(arguments: Namespace) -> int:
    import sys

    from uniapl.config_errors import ConfigError
    from uniapl.data.importing.job import run_import as run
    from uniapl.data.importing.records import Request
    from uniapl.data.importing.summary import as_json, summary
    from uniapl.data.progress import Bar

    a = arguments
    if (a.model is None) != (a.max_response_tokens is None):
        raise ConfigError("--max-response-tokens: goes with --model; allowed: both or neither")
    kind, column = _verifier(a.verifier)
    request = Request(
        a.inputs, a.out, a.format, a.prompt, a.response, column, kind,
        a.on_bad_row, a.rows_per_shard, a.shards, a.heldout, a.model, a.max_response_tokens,
    )  # fmt: skip
    try:
        with Bar() as bar:
            ledger = run(request, bar, a.overwrite)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command goes on where it was", file=sys.stderr)
        return 130
    print(as_json(ledger, a.out) if a.json else summary(ledger, a.out))
    return 0


def _verifier(said: str | None) -> tuple[Any, str | None]:
    """What --verifier's column holds, and its name."""
    kind, _, column = (said or "").partition("=")
    return (kind, column) if column and kind in ("answer", "number") else ("object", said)


def run_inspect(arguments: Namespace) -> None:
    from uniapl.data.inspection.show import inspect

    inspect(arguments.shards, arguments.model, arguments.rows, arguments.json)


def run_model(arguments: Namespace) -> None:
    from uniapl.data.local_model import prepare_model

    print(f"model: {prepare_model(arguments.out)}")


def run_prepare(arguments: Namespace) -> None:
    from actors.sample import sample_responses
    from uniapl.data.local_dataset import prepare

    print(prepare(arguments.out, arguments.model, arguments.seed, arguments.record, sample_responses))
