"""docs/reference/config.md, written from the configuration's own tree.

python -m uniapl.config_reference docs/reference/config.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from uniapl.config import Config
from uniapl.config_errors import describe, submodel
from uniapl.objective_config import Coefficient

HEAD = """\
# Configuration

Every key of the tree, its allowed values, default and meaning. This page is written from
[`uniapl/config.py`](../../uniapl/config.py), [`uniapl/objective_config.py`](../../uniapl/objective_config.py) and
[`uniapl/queue_config.py`](../../uniapl/queue_config.py) by
`make docs`; a test holds that it is up to date.

A configuration is a YAML file of these sections. `-m METHOD` lays the values of a small file over it, and `KEY=VALUE`
on the command line over both:

    uniapl train configs/local.yaml -m uniapl run.steps=10 objective.adversarial.weight=0.2

A wrong key or value is one line that names it, before any process starts. *Text* is one line of 1 to 4095
characters, without control characters.
"""
TEXT = "one line of 1 to 4095 characters, without control characters"
UNITS = {
    "_s": "s",
    "_seconds": "s",
    "_gib": "GiB",
    "_tokens": "tokens",
    "max_model_len": "tokens",
    "steps": "steps",
    "_every": "steps",
    "max_staleness": "versions",
    "threads": "threads",
}
"""By how a key ends."""


def page() -> str:
    """The whole page, Markdown."""
    parts = [HEAD]
    for name, field in Config.model_fields.items():
        section = submodel(field.annotation)
        if section is None:
            raise TypeError(f"{name}: not a section")
        parts += [f"## {name}\n", _about(section), _table(section, f"{name}.")]
    parts += ["## A term's weight\n", _about(Coefficient), _table(Coefficient, "objective.TERM.weight.")]
    return "\n".join(parts)


def all_keys(section: type[BaseModel] = Config, above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that holds a value, dotted, in the order of the tree; a term's weight counts as one value."""
    for name, field in section.model_fields.items():
        below = submodel(field.annotation)
        if below is None or below is Coefficient or isinstance(field.default, list):
            yield above + name, field
        if below is not None and below is not Coefficient:
            inner = f"{above}{name}.N." if isinstance(field.default, list) else f"{above}{name}."
            yield from all_keys(below, inner)


def _about(section: type[BaseModel]) -> str:
    """The section's docstring, its lines that belong together joined."""
    text = "\n".join(line.strip() for line in (section.__doc__ or "").strip().splitlines())
    return text.replace("[", "\\[") + "\n"


def _table(section: type[BaseModel], above: str) -> str:
    lines = ["| key | allowed | default | unit | what |", "|---|---|---|---|---|"]
    for key, field in all_keys(section, above):
        is_weight = submodel(field.annotation) is Coefficient
        allowed = (
            "a number >= 0, or [a section](#a-terms-weight)"
            if is_weight
            else _cell(describe(field).replace(TEXT, "text"))
        )
        cells = [f"`{key}`", allowed, _default(field), _unit(key), _cell(field.description or "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, Coefficient):
        value = value.value
    if isinstance(value, list):
        value = [item.model_dump(exclude_defaults=True) if isinstance(item, BaseModel) else item for item in value]
    return f"`{value if isinstance(value, str) else _yaml(value)}`"


def _yaml(value: Any) -> str:
    """On one line; YAML reads all of JSON."""
    return json.dumps(value)


def _unit(key: str) -> str:
    return next((unit for end, unit in UNITS.items() if key.endswith(end)), "")


def _cell(text: str) -> str:
    for mark in "*_[":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("<", "&lt;").replace("|", "&#124;")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
