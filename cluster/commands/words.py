"""Arguments that several commands share, and what their values may be."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_config(parser: argparse.ArgumentParser, example: str, config: str = "a YAML file") -> None:
    """CONFIG, KEY=VALUE and --method, which together name one configuration."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help=config)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"such as {example}")
    parser.add_argument("-m", "--method", help="a file in CONFIG's methods/ folder, such as sft, or a path")


def count(text: str) -> int:
    """A whole number of 0 or more."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: 0 or more")
    return number


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
