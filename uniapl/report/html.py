"""Fills a template into one HTML file that needs no other and no network."""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from uniapl.report.axes import clock, compact, percent, points
from uniapl.report.samples import shown

FOLDER = Path(__file__).parent
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write the filled template to `path`, whole or not at all; the path."""
    fresh = path.with_suffix(".tmp")
    fresh.write_bytes(fill(template, **values).encode("utf-8", "replace"))
    fresh.replace(path)
    return path


def fill(template: str, **values: Any) -> str:
    """The page as text. Whatever is not Markup is escaped."""
    script, style = ((FOLDER / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(style),  # noqa: S704 (our own file)
            script=Markup(script),  # noqa: S704 (our own file)
            style_hash=_policy_hash(style),
            script_hash=_policy_hash(script),
            **values,
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """With the templates it has compiled."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, finalize=_visible
    )
    environment.filters |= {"percent": percent, "points": points, "clock": clock, "compact": compact, "shown": shown}
    return environment


def _policy_hash(text: str) -> str:
    """What the page's Content-Security-Policy knows an inline script or style by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _visible(value: Any) -> Any:
    """Control characters in data as their pictures: HTML has no other way to hold them."""
    return value.translate(CONTROLS) if type(value) is str else value
