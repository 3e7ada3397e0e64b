"""Which of a run's recorded steps can be made again, and from where."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from cluster.checkpoints import newest_checkpoint, other_versions
from uniapl.config_errors import ConfigError
from uniapl.data.errors import DataError
from uniapl.recorded import Recorded, read_recorded
from uniapl.runlog import RunError, read_metrics

MEASURED = ("loss/", "share/", "gradient/", "importance/", "ratio/", "correction/", "kl/", "entropy/", "expert/")
MEASURED_TOO = ("learner/grad_norm", "discriminator/loss", "discriminator/grad_norm", "tokens/trained")


@dataclass(frozen=True)
class Steps:
    """The recorded steps that lead from a known state of the weights to the one asked for, the last of them."""

    recorded: list[Recorded]
    start: Path | None
    """A checkpoint; None: the model's folder, before the first step."""
    metrics: dict[str, float]
    """Of the last one; empty where it could not be made."""


def find_steps(folder: Path, step: int, failed: bool = False) -> Steps:
    """What is needed for a step, from the newest whole checkpoint before it on.

    Raises:
        ConfigError: it is no run's folder, or its batches do not lead to the step.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: holds no config.yaml; allowed: the folder of a run, such as runs/local")
    metrics = {record["step"]: record for record in read_metrics(folder)}
    kept = {s for s in metrics if _file(folder, s).is_file()}  # later ones are of a life that was undone
    not_made = {s for s in map(_step_of, (folder / "failed").glob("step-*.arrow")) if s}
    checkpoints = {s for s in map(_step_of, (folder / "checkpoints").glob("step-*")) if s is not None}
    reachable = _reachable(kept, not_made, checkpoints)
    if step not in reachable:
        raise ConfigError(
            f"STEP: got {step}; allowed: {_ranges(reachable)}, whose batch is in {folder} "
            "with a checkpoint before it, or all batches from the first"
        )
    found = newest_checkpoint(folder, before=step)
    first, start = found if found else (0, None)
    if any(s not in kept for s in range(first + 1, step)):  # a checkpoint was damaged
        raise RunError(f"step {step}: the batches after step {first} are not all in {folder}; allowed: a later step")
    if start is not None and (line := other_versions(start)) is not None:
        warnings.warn(line, stacklevel=2)
    again = failed or step not in kept
    if failed and step not in not_made:
        raise ConfigError(f"--failed: got step {step}; allowed: {_ranges(not_made)}, without --failed any other")
    files = [_file(folder, s) for s in range(first + 1, step)]
    files.append(_file(folder, step, "failed" if again else "batches"))
    recorded = [read_recorded(file) for file in files]
    for number, (file, one) in enumerate(zip(files, recorded, strict=True), start=first):
        if one.batch.step != number:
            raise DataError(f"{file}: is of step {one.batch.step + 1}; allowed: the batch of step {number + 1}")
    return Steps(recorded, start, {} if again else measurements(metrics[step]))


def _file(folder: Path, step: int, part: str = "batches") -> Path:
    return folder / part / f"step-{step - 1:05d}.arrow"


def _step_of(path: Path) -> int | None:
    """From 1 for a batch; of a checkpoint the steps made."""
    number = path.stem.removeprefix("step-")
    return (int(number) + (path.suffix == ".arrow")) if number.isdigit() else None


def _reachable(kept: set[int], not_made: set[int], checkpoints: set[int]) -> set[int]:
    known = {0} | checkpoints  # after so many steps the weights are known
    for step in range(1, max(kept, default=0) + 1):
        if step - 1 in known and step in kept:
            known.add(step)
    return {step for step in kept | not_made if step - 1 in known}


def _ranges(steps: set[int]) -> str:
    """Such as `1 to 3, 5`."""
    ordered = sorted(steps)
    starts = [s for s in ordered if s - 1 not in steps]
    ends = [s for s in ordered if s + 1 not in steps]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)) or "none"


def measurements(metrics: dict[str, float]) -> dict[str, float]:
    """Those that the learner alone makes of a batch, times and rates apart."""
    return {key: value for key, value in metrics.items() if key.startswith(MEASURED) or key in MEASURED_TOO}
