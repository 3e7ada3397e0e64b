"""What the batches that a run consumed must show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uniapl.config import load_config
from uniapl.data.sources import open_sources

EXPERTS = 32
"""Rows of the toy shards that have an expert's response: an epoch of demonstrations."""


def assert_demonstrations_in_order(config: Path, batches: list[list[dict[str, Any]]], per_step: int) -> None:
    """Over all lives of a run, and more than an epoch, they come as the cursor gives them: none skipped or repeated.

    Args:
        config: of the run, with the toy shards.
        batches: rows of every step, from the first one on.
        per_step: demonstrations of a step.
    """
    shown = [row["prompt_id"] for batch in batches for row in batch if row["kind"] == "demonstration"]
    _, demonstrations = open_sources(load_config(config))
    assert demonstrations is not None
    assert shown == [demonstrations.next().id for _ in range(len(batches) * per_step)]
    assert len(set(shown[:EXPERTS])) == EXPERTS < len(shown)
