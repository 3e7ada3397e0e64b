"""The commands of `uniapl`, one module each: `add` describes it to argparse, and what it imports to run waits.

A new command is a new module and its name in `ALL`.
"""

from __future__ import annotations

from types import ModuleType

from cluster.commands import completion, data, doctor, eval, export, plan, replay, report, submit, train, watch

ALL: tuple[ModuleType, ...] = (train, submit, watch, report, eval, export, replay, plan, doctor, data, completion)
"""In the order of the help. Each has `add(commands)`, whose parser sets `run`: Namespace -> exit status or None."""
