"""Batches as runs/NAME/batches/ keeps them: what a step consumed, and what it was made with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from uniapl.config import Config
from uniapl.config_errors import validation_lines
from uniapl.data.errors import DataError
from uniapl.data.ipc_size import largest_block
from uniapl.data.reader import DAMAGED, MAX_BLOCK_BYTES
from uniapl.objective_config import TERMS
from uniapl.records import (
    BATCH_SCHEMA,
    Demonstration,
    Group,
    MixedBatch,
    Prompt,
    Sample,
    Score,
    VersionSpan,
    batch_table,
)
from uniapl.runlog import strict_json

CONFIG, WEIGHTS = b"uniapl.config", b"uniapl.weights"
"""Keys of the file's metadata: JSON of the configuration, and of every term's weight in this step."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Recorded:
    """A step that was made, or that could not be made: its batch, the run's configuration then, the terms' weights."""

    batch: MixedBatch
    config: Config
    weights: dict[str, float]


def recorded_table(batch: MixedBatch, config: Config, weights: dict[str, float]) -> pa.Table:
    """A step as a table of `BATCH_SCHEMA` whose metadata hold configuration and weights."""
    told = {CONFIG: config.model_dump_json(), WEIGHTS: json.dumps(weights)}
    return batch_table(batch).replace_schema_metadata(told)


def read_recorded(path: Path) -> Recorded:
    """The inverse of `recorded_table`, from a file; nothing in it is believed.

    Prompts come back as token ids, without their messages, verifiers and the expert's text.

    Raises:
        DataError: there is no such file, or it is not what a run writes.
    """
    table = _table(path)
    config, weights = _told(path, table.schema.metadata or {})
    try:
        rows = table.to_pylist()
        samples = [row for row in rows if row["kind"] == "sample"]
        groups = [_group(list(own)) for _, own in groupby(samples, key=lambda row: row["lease_id"])]
        shown = [_demonstration(row) for row in rows if row["kind"] == "demonstration"]
        [step] = {row["step"] for row in rows}
        if len(rows) != len(samples) + len(shown) or len({g.lease_id for g in groups}) != len(groups):
            raise ValueError("rows of another kind or order")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not what a run writes: {error}; allowed: a file of a run's batches/") from None
    return Recorded(MixedBatch(step, groups, shown), config, weights)


def _table(path: Path) -> pa.Table:
    if not path.is_file():
        raise DataError(f"{path}: no such file; allowed: a file of a run's batches/")
    try:
        if (size := largest_block(path)) > MAX_BLOCK_BYTES:
            raise ValueError(f"{size >> 20} MiB once decoded, allowed: {MAX_BLOCK_BYTES >> 20} MiB")
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
            table.validate(full=True)
    except DAMAGED as error:
        raise DataError(f"{path}: damaged or no Arrow file: {error}; allowed: a file of a run's batches/") from None
    if not table.schema.equals(BATCH_SCHEMA):
        lacking = sorted(set(BATCH_SCHEMA.names) - set(table.column_names))
        what = f"lacks the columns {', '.join(lacking)}" if lacking else "has other columns"
        raise DataError(f"{path}: {what}; allowed: a batch that this version of uniapl wrote")
    return table


def _told(path: Path, metadata: dict[bytes, bytes]) -> tuple[Config, dict[str, float]]:
    try:
        config = Config.model_validate(strict_json(metadata[CONFIG]))
        weights = {term: float(value) for term, value in strict_json(metadata[WEIGHTS]).items()}
        if sorted(weights) != sorted(TERMS) or not all(math.isfinite(w) and w >= 0 for w in weights.values()):
            raise ValueError(f"weights {weights}")
    except ValidationError as error:
        line = validation_lines(error, Config, lambda _: str(path))[0]
        raise DataError(f"{line}: another version of uniapl wrote it; allowed: that version") from None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: no configuration and weights are recorded in it ({type(error).__name__}: {error}); "
            "allowed: a batch that this version of uniapl wrote"
        ) from None
    return config, weights


def _group(rows: list[Row]) -> Group:
    first = rows[0]
    prompt = Prompt(first["prompt_id"], [], _ids(first["prompt_ids"]), expert_ids=first["expert_ids"])
    return Group(first["lease_id"], prompt, [_sample(row) for row in rows], first["actor"])


def _sample(row: Row) -> Sample:
    ids, logprobs = _ids(row["response_ids"], empty=True), row["logprobs"]
    if len(logprobs) != len(ids):
        raise ValueError(f"{row['prompt_id']!a:.80}: {len(ids)} tokens and {len(logprobs)} log-probabilities")
    checks = {str(name): bool(passed) for name, passed in strict_json(row["checks"]).items()}
    score = Score(row["reward"], None, checks, row["expert_score"], row["expert_reference"])
    if not all(map(_finite, (score.reward, score.expert_score or 0.0, score.expert_reference or 0.0))):
        raise ValueError(f"{row['prompt_id']!a:.80}: a score that is no finite number")
    spans = [VersionSpan(**span) for span in row["versions"]]
    return Sample(ids, logprobs, spans, str(row["text"]), str(row["finish_reason"]), score)


def _demonstration(row: Row) -> Demonstration:
    return Demonstration(row["prompt_id"], _ids(row["prompt_ids"]), _ids(row["response_ids"], empty=True))


def _ids(ids: list[int], empty: bool = False) -> list[int]:
    if not (ids or empty) or any(i is None or i < 0 for i in ids):
        raise ValueError(f"token ids {ids!r:.80}")
    return ids


def _finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def token_ids(batch: MixedBatch) -> Iterator[list[int]]:
    """Prompt and response of every sequence."""
    for group in batch.groups:
        yield from (group.prompt.token_ids + sample.token_ids for sample in group.samples)
        if group.prompt.expert_ids is not None:
            yield group.prompt.token_ids + group.prompt.expert_ids
    yield from (d.prompt_ids + d.response_ids for d in batch.demonstrations)
