"""Arguments that several commands share, and what their values may be."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def example(line: str) -> str:
    """The end of a command's help."""
    return f"example:\n  {line}"


def add_json(parser: argparse.ArgumentParser, what: str = "one JSON object") -> None:
    """--json: on standard output nothing but `what`."""
    parser.add_argument("--json", action="store_true", help=what)


def tell(as_json: bool, found: dict[str, Any]) -> None:
    """What a command has made, as one JSON object or as a line for each."""
    print(json.dumps(found) if as_json else "\n".join(f"{name}: {value}" for name, value in found.items()))


def add_config(
    parser: argparse.ArgumentParser, override: str, config: str = "a YAML file", optional: bool = False
) -> None:
    """CONFIG, KEY=VALUE and --method, which together name one configuration."""
    parser.add_argument("config", type=Path, nargs="?" if optional else None, metavar="CONFIG", help=config)
    overrides = parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"such as {override}")
    overrides.completer = _keys  # type: ignore[attr-defined]  # (argcomplete's)
    told = "a file in CONFIG's methods/ folder, such as sft, or a path; may be repeated"
    parser.add_argument("-m", "--method", action="append", default=[], dest="methods", metavar="METHOD", help=told)


def count(text: str) -> int:
    """A whole number of 0 or more."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"got {text}; allowed: a whole number, 0 or more")
    return int(text)


def whole(text: str) -> int:
    """A whole number of 1 or more."""
    if (number := count(text)) == 0:
        raise argparse.ArgumentTypeError("got 0; allowed: 1 or more")
    return number


def positive(text: str) -> float:
    """A finite number above 0."""
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}; allowed: a number > 0")
    return number


def dtype(text: str) -> str:
    """A type of weights."""
    if text not in ("bfloat16", "float32"):
        raise argparse.ArgumentTypeError(f"got {text}; allowed: bfloat16, float32")
    return text


def stopped() -> int:
    """Tell of a Ctrl-C that leaves nothing to be resumed; returns the exit status."""
    print("stopped by Ctrl-C; nothing was written", file=sys.stderr)
    return 130


def _keys(prefix: str, **_: object) -> list[str]:
    """Keys of the configuration that go on from `prefix`, for the shell's completion."""
    from pydantic import BaseModel

    from uniapl.config import Config
    from uniapl.config_errors import submodel

    *above, _last = prefix.split(".")
    model: type[BaseModel] | None = Config
    for part in above:
        field = model.model_fields.get(part) if model else None
        model = submodel(field.annotation) if field else None
    start = "".join(f"{part}." for part in above)
    fields = model.model_fields.items() if model else ()
    return [f"{start}{name}{'.' if submodel(field.annotation) else '='}" for name, field in fields]
