"""`uniapl completion`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from cluster.commands.words import example

SHELLS = ("bash", "zsh", "fish")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "completion",
        help="print what a shell needs to complete commands, options and keys",
        epilog=example('eval "$(uniapl completion bash)"    (fish: uniapl completion fish | source)'),
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> None:
    import argcomplete

    # A key's next level goes on in the same word: no space after the dot either.
    print(argcomplete.shellcode(["uniapl"], shell=arguments.shell).replace("[=/:]", "[=/:.]"))
