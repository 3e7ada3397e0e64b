"""The command `uniapl`. Heavy imports wait until a command needs them, so that help is instant."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from cluster.commands import ALL


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: done, or ended by SIGTERM; 1: a plan does not fit (or a traceback); 2: wrong input, or the run cannot go on;
    130: Ctrl-C.
    """
    if not Path("/proc/driver/nvidia").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for a GPU and warns at every import
    sys.path.insert(0, os.getcwd())  # where a user's `module:function` rewards stand
    arguments = _arguments(argv)
    from cluster.signals import Terminated
    from uniapl.config_errors import ConfigError
    from uniapl.data.errors import DataError
    from uniapl.runlog import RunError

    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        return int(arguments.run(arguments) or 0)
    except (ConfigError, DataError, RunError) as error:
        print(getattr(error, "cause", error), file=sys.stderr)  # Ray hands on an actor's error with it as the cause
        return 2
    except Terminated:
        print("ended by SIGTERM; `--resume` goes on from the newest checkpoint", file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; `--resume` goes on from the newest checkpoint", file=sys.stderr)
        return 130


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, parsed; KEY=VALUE may also stand after options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(late) < len(rest) or (late and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        arguments.overrides += late
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uniapl", description="Post-train a language model with demonstrations, rollouts and an adversarial term."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in ALL:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
