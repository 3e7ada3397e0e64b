"""Two runs compared bit by bit: consumed batches, metrics that are no times, and the model."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from uniapl.runlog import read_metrics

TIMED = ("time", "_per_s", "queue/", "broadcast/", "fleet/", "eval/")
"""Parts of the names of metrics that measure the machine, or how far the rollout actors were at that moment, or of
evaluations beside training, which one run may make and the other not."""


def differences(ours: Path, theirs: Path, steps: int) -> list[str]:
    """What differs between two runs' folders, in words; empty when every number is the same."""
    found = [f"batch {k}: {what}" for k in range(steps) for what in _batch_differences(ours, theirs, k)]
    a, b = (read_metrics(run) for run in (ours, theirs))
    if [m["step"] for m in a] != list(range(1, steps + 1)) or len(a) != len(b):
        found.append(f"steps {[m['step'] for m in a]} and {[m['step'] for m in b]}")
    for x, y in zip(a, b, strict=False):
        keys = {key for key in x.keys() | y.keys() if not any(part in key for part in TIMED)}
        found += [f"step {x['step']}: {key} {x.get(key)} {y.get(key)}" for key in keys if x.get(key) != y.get(key)]
    if (ours / "model" / "model.safetensors").read_bytes() != (theirs / "model" / "model.safetensors").read_bytes():
        found.append("the weights")
    return found


def _batch_differences(ours: Path, theirs: Path, step: int) -> list[str]:
    a, b = (pa.ipc.open_file(run / "batches" / f"step-{step:05d}.arrow").read_all() for run in (ours, theirs))
    return [name for name in a.column_names if json.dumps(a[name].to_pylist()) != json.dumps(b[name].to_pylist())]
