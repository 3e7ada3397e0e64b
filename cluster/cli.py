"""The command `uniapl`. Heavy imports wait until a command needs them, so that help is instant."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from pathlib import Path

from cluster.commands import ALL
from cluster.help import EXAMPLE, EXIT_STATUS, lay_out


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: done, or ended by SIGTERM; 1: the answer is no (a plan does not fit, the doctor found a problem, a step is not
    reproduced), or an error that nobody foresaw; 2: wrong input, or the run cannot go on; 130: Ctrl-C.
    """
    if not Path("/proc/driver/nvidia").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for a GPU and warns at every import
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        return _run(_arguments(argv))
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    from uniapl.config_errors import ConfigError
    from uniapl.data.errors import DataError
    from uniapl.runlog import RunError

    try:
        return int(arguments.run(arguments) or 0)
    except (ConfigError, DataError, RunError) as error:
        print(getattr(error, "cause", error), file=sys.stderr)  # Ray hands on an actor's error with it as the cause
        return 2
    except Exception:
        traceback.print_exc()
        print("not foreseen; `uniapl doctor` checks this machine, `train --debug` shows all logs", file=sys.stderr)
        return 1


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, parsed; KEY=VALUE may also stand after options."""
    parser = command_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for what may come next
        import argcomplete

        argcomplete.autocomplete(parser, always_complete_options=False)
    arguments, rest = parser.parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(late) < len(rest) or (late and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        arguments.overrides += late
    return arguments


def command_parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="uniapl",
        description="Post-train a chat model with demonstrations, rollouts and an adversarial term.",
        epilog=f"{EXAMPLE}\n{EXIT_STATUS}",
    )
    commands = parser.add_subparsers(
        required=True, title="commands (`uniapl COMMAND --help` tells more)", metavar="COMMAND"
    )
    for command in ALL:
        command.add(commands)
    lay_out(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
