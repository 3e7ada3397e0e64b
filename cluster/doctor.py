"""`uniapl doctor`: whether this machine can hold a run, by checks that start nothing and end within 20 seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from uniapl.config import Config

LIMIT_S = 18.0
"""For all checks; what has not answered by then is reported so."""
State = Literal["ok", "warning", "problem"]
STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Finding:
    """What one check found; `advice` is what to do next, empty where nothing needs to be done."""

    check: str
    state: State
    found: str
    advice: str = ""


Check = Callable[[], Finding]


WITH_CONFIG = "Redis, a Ray cluster, model, data and what a run takes are checked with a CONFIG: `uniapl doctor CONFIG`"


def examine(config: Config | None, began: float | None = None) -> list[Finding]:
    """Run all checks, those of a configuration too where there is one; in the order of the table.

    `LIMIT_S` counts from `began` on the monotonic clock, where the command began earlier.

    What imports something heavy runs in one thread after the other, since Python's imports wait for each other;
    checks that ask somebody else have a thread each.
    """
    from cluster import doctor_config, doctor_machine, doctor_torch

    quick = doctor_machine.checks()
    heavy = doctor_torch.checks()
    asking: dict[str, Check] = {}
    if config is not None:
        quick |= doctor_config.quick_checks(config)
        heavy |= doctor_config.heavy_checks(config)
        asking = doctor_config.asking_checks(config)
    found: dict[str, Finding] = {}
    groups = [quick, heavy, *({name: check} for name, check in asking.items())]
    threads = [threading.Thread(target=_run, args=(group, found), daemon=True) for group in groups]
    deadline = (time.monotonic() if began is None else began) + LIMIT_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    names = [*quick, *heavy, *asking]
    return [found.get(name) or _silent(name) for name in names]


def _run(checks: dict[str, Check], found: dict[str, Finding]) -> None:
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception as error:  # a check that breaks must not hide the others
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            found[name] = Finding(name, "problem", f"the check itself failed: {reason}", "look into this error first")


def _silent(name: str) -> Finding:
    advice = "run it once more on a quiet machine; if it stays so, a disk or a network does not answer"
    return Finding(name, "warning", f"no answer within {LIMIT_S:g} s", advice)


def show(findings: list[Finding], seconds: float, more: str = "") -> None:
    """A table, what to do next below what it is about, one line that sums it up, and `more` below it."""
    console = Console()
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("check", "", "found, and what to do next"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        told = finding.found + (f"\n-> {finding.advice}" if finding.advice else "")
        table.add_row(finding.check, f"[{STYLES[finding.state]}]{finding.state}[/]", _plain(told))
    console.print(table)
    console.print(f"{_counts(findings)} in {seconds:.1f} s", highlight=False)
    if more:
        console.print(more, highlight=False, markup=False)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _counts(findings: list[Finding]) -> str:
    return ", ".join(_several(sum(f.state == state for f in findings), state) for state in STYLES)


def _several(number: int, state: str) -> str:
    return f"{number} {state}" + ("s" if number != 1 and state != "ok" else "")


def as_json(findings: list[Finding], seconds: float) -> dict[str, Any]:
    """The same for a program."""
    return {
        "checks": [asdict(finding) for finding in findings],
        "problems": sum(f.state == "problem" for f in findings),
        "warnings": sum(f.state == "warning" for f in findings),
        "seconds": round(seconds, 1),
    }


def worst(states: Iterator[State]) -> State:
    """The most serious of several."""
    return max(states, key=list(STYLES).index, default="ok")
