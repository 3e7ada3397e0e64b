"""The objective's weights in words, for the head of the report."""

from __future__ import annotations

import math
from typing import Any

from uniapl.report.axes import compact

TERMS = ("preference", "demonstration", "adversarial", "kl")


def objective_words(objective: Any) -> str:
    """The terms that a run had and their weights, such as `preference: 1; demonstration: 0.5`.

    `objective` is the section of a run's config.yaml, or whatever stands in its place: what cannot be read is
    left out.
    """
    parts = []
    sections = objective if isinstance(objective, dict) else {}
    for term, section in ((term, sections.get(term)) for term in TERMS):
        if isinstance(section, dict) and (words := weight_words(section.get("weight"))):
            parts.append(f"{term}: {words}{_discriminator(section)}")
    return "; ".join(parts)


def weight_words(weight: Any) -> str:
    """A weight as a number or a section of `uniapl.objective_config.Coefficient`; empty for none and for 0."""
    section = weight if isinstance(weight, dict) else {"value": weight}
    kind = section.get("kind", "constant")
    value, end, steps, target = (_number(section.get(key)) for key in ("value", "end", "steps", "target"))
    if kind == "schedule":
        warmup = section.get("warmup_steps")
        return f"schedule {value} → {end} in {steps} steps" + (f", {_number(warmup)} of them warm-up" if warmup else "")
    if kind == "switch":
        return f"{value} for {steps} steps, then {end}"
    if kind == "complement":
        return "1 − demonstration"
    if kind == "lagrangian":
        return f"lagrangian, target {target}"
    return value if kind == "constant" and value not in ("0", "?") else ""


def _number(value: Any) -> str:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return compact(value) if known else "?"


def _discriminator(section: dict[str, Any]) -> str:
    kind = section.get("discriminator")
    if not isinstance(kind, str):
        return ""
    return f" ({kind}, within the reward)" if section.get("as_reward") is True else f" ({kind})"
