"""What is said at the end of an import."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from uniapl.data.importing.ledger import Ledger
from uniapl.data.importing.scan import HELDOUT


def summary(ledger: Ledger, folder: Path) -> str:
    """The lines: what was read, written and skipped, and the keys that a configuration names the files by."""
    counts, names = ledger.counts, [file["name"] for file in ledger.files]
    lines = [f"{source['name']}: format {source['format']}" for source in ledger.inputs]
    prompts = f", of which {counts.without_response:,} are prompts alone" if counts.without_response else ""
    lines.append(
        f"{counts.imported:,} training rows{prompts} in {ledger.shards} shard{'s' * (ledger.shards > 1)} of {folder}"
    )
    if counts.pairs:
        lines.append(f"{counts.pairs:,} preference pairs in comparisons-*.arrow")
    if HELDOUT in names:
        rows = next(file["rows"] for file in ledger.files if file["name"] == HELDOUT)
        lines.append(f"{rows:,} held-out prompts in {HELDOUT}; {counts.held_back:,} rows had one of them")
    for reason, found in ledger.counts.skipped.items():
        lines.append(f"skipped {found['rows']:,}: {reason}; the first: {found['first']}")
    lines.append(f'data.train=["{folder}/train-*.arrow"]')
    if HELDOUT in names:
        lines[-1] += f' data.heldout=["{folder}/{HELDOUT}"]'
    if counts.pairs:
        lines.append(f'objective.adversarial.cotrained.comparisons=["{folder}/comparisons-*.arrow"]')
    return "\n".join(lines)


def as_json(ledger: Ledger, folder: Path) -> str:
    """The same for a program, as one object."""
    counts = dataclasses.asdict(ledger.counts)
    found = {"folder": str(folder), "shards": ledger.shards, **counts, "inputs": ledger.inputs, "files": ledger.files}
    return json.dumps(found)
