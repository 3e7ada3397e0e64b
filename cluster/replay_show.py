"""What `uniapl replay` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.replay import TOLERANCE, Replay

ORDER = ("loss/", "learner/grad_norm", "share/")
"""What stands above the other metrics."""
TEXT = 60
"""Characters of a response."""


def show_replay(found: Replay, override: str | None) -> None:
    """Recorded and replayed values side by side, and what was found of those to blame."""
    console = Console()
    if found.replayed or found.changed:
        console.print(_table(found, override is not None))
    if override:
        console.print(Text(f"changed: the same step with {override}"))
    for name, failure in found.failures.items():
        console.print(Text(f"{name}: {failure}"))
    for sequence in found.blamed:
        console.print(Text("  " + _blamed(sequence)), soft_wrap=True)
    console.print(Text(verdict(found)), soft_wrap=True)


def verdict(found: Replay) -> str:
    """One line: whether it is the recorded step."""
    if found.failures.get("replayed") and not found.recorded:
        return f"step {found.step}: not finite, as in the run"
    if not found.recorded:
        return f"step {found.step}: NOT reproduced: loss and gradient are finite here, and were not in the run"
    key = "loss/total"
    if found.reproduced:
        difference = abs(found.replayed[key] - found.recorded[key])
        return f"step {found.step}: reproduced, {key} within {difference:.1e}"
    allowed = f"allowed: {TOLERANCE[found.dtype]:g} in {found.dtype}"
    return f"step {found.step}: NOT reproduced ({allowed}); compare versions.json, and the machine with the run's"


def as_json(found: Replay, override: str | None) -> dict[str, Any]:
    """The same for a program."""
    return {
        "step": found.step,
        "reproduced": found.reproduced,
        "recorded": found.recorded,
        "replayed": found.replayed,
        "change": override,
        "changed": found.changed,
        "failures": found.failures,
        "blamed": found.blamed,
    }


def _table(found: Replay, changed: bool) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column(f"step {found.step}", no_wrap=True)
    parts = {"recorded": found.recorded, "replayed": found.replayed} | ({"changed": found.changed} if changed else {})
    shown = {name: part for name, part in parts.items() if part or name == "changed"}
    for title in (*shown, "difference"):
        table.add_column(title, justify="right", no_wrap=True)
    *_, before, after = ({}, *shown.values())  # what was changed against what was replayed, or that against the run
    for key in _keys(found):
        cells = [_number(part.get(key)) for part in shown.values()]
        table.add_row(key, *cells, _difference(before.get(key), after.get(key)))
    return table


def _keys(found: Replay) -> list[str]:
    keys = list(found.recorded | found.replayed | found.changed)
    return sorted(keys, key=lambda key: next((i for i, start in enumerate(ORDER) if key.startswith(start)), len(ORDER)))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _difference(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None else f"{b - a:+.1e}" if b != a else "0"


def _blamed(sequence: dict[str, Any]) -> str:
    """Such as `p/0  reward 1e+40  advantage of preference 7e+39  12 tokens  lowest log-probability -9.3  "text"`."""
    parts = [sequence["id"]]
    if "tokens" in sequence:
        parts += [f"reward {_number(sequence['reward'])}"]
        parts += [f"expert score {_number(sequence['expert_score'])}"] if sequence["expert_score"] is not None else []
        parts += [f"advantage of {term} {value:.3g}" for term, value in sequence["advantages"].items()]
        parts += [f"{sequence['tokens']} tokens", f"lowest log-probability {_number(sequence['lowest_logprob'])}"]
        parts += [ascii(sequence["text"][:TEXT])]
    return "  ".join(parts)
