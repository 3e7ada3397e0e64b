"""The metrics of a run: one JSON object per optimizer step, and the same scalars for TensorBoard and other loggers."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from uniapl.loggers import Guarded

METRICS_FILE = "metrics.jsonl"
ENDED_FILE = "ended"
"""Beside the metrics of a run that ended by an error or a signal, until it goes on."""
TENSORBOARD_FOLDER = "tensorboard"


class RunError(ValueError):
    """A file of a run folder cannot be read or must not be written; the message is one line for the user."""


class RunLog:
    """Appends metrics to `run_dir/metrics.jsonl`; each line can be read by others when `log` returns.

    Opening it on an existing run continues the file: a torn last line is dropped. Steps must rise; a run
    that goes on from a checkpoint first calls `truncate_after` with the checkpoint's step.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, others: Sequence[Guarded] = ()) -> None:
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._tensorboard = tensorboard
        self._others = others
        self._writer: Any = None
        self._last_step: int | None = None
        self.logged = 0
        """Steps, since it was opened."""
        (self._run_dir / ENDED_FILE).unlink(missing_ok=True)
        self._rewrite(read_metrics(self._run_dir))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one step; `time` (unix seconds) is added where the metrics have none.

        Raises:
            RunError: a value is no finite number, or the step is not after the last one.
        """
        if self._last_step is not None and step <= self._last_step:
            raise RunError(f"step {step} logged after step {self._last_step}; allowed: rising steps")
        numbers = {key: _finite(step, key, value) for key, value in metrics.items()}
        record = {"step": step, "time": time.time()} | numbers | {"step": step}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = step
        self.logged += 1
        if self._tensorboard:
            self._write_scalars(record)
        for other in self._others:
            other.log(record)

    def truncate_after(self, step: int) -> None:
        """Drop what was logged after `step`, here and in TensorBoard: those steps are made again."""
        self._file.close()
        self._rewrite([record for record in read_metrics(self._run_dir) if record["step"] <= step])
        self._close_writer()
        if self._tensorboard:
            self._writer = _event_writer(self._run_dir)
            self._begin_again(step + 1)

    def close(self, failed: bool = False) -> None:
        """Flush and close, and tell the other loggers how the run ended; a second call does nothing."""
        others, self._others = self._others, ()
        for other in others:
            other.close(failed)
        self._file.close()
        self._close_writer()
        if failed:
            (self._run_dir / ENDED_FILE).touch()

    def _rewrite(self, records: list[dict[str, Any]]) -> None:
        """Replace the file by `records` in one move, and open it for appending."""
        path = self._run_dir / METRICS_FILE
        fresh = path.with_suffix(".tmp")
        with fresh.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        self._last_step = records[-1]["step"] if records else None
        self._file = path.open("a", encoding="utf-8")

    def _write_scalars(self, record: dict[str, Any]) -> None:
        if self._writer is None:
            self._writer = _event_writer(self._run_dir)
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=key, simple_value=value) for key, value in record.items() if key not in ("step", "time")
        ]
        self._writer.add_event(Event(wall_time=record["time"], step=record["step"], summary=Summary(value=values)))
        self._writer.flush()

    def _begin_again(self, step: int) -> None:
        """Have TensorBoard show nothing from `step` on that was written before."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=start))

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run in the order of their steps; empty when nothing was logged yet.

    A last line that a crash left unfinished is dropped with a warning.

    Raises:
        RunError: another line is no JSON object with a whole `step` and finite numbers.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return []
    *lines, tail = path.read_bytes().split(b"\n")
    if tail:
        warnings.warn(f"{path}: the last line is unfinished and was dropped", stacklevel=2)
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = strict_json(line)
    except ValueError:
        raise RunError(f"{path} line {number}: not valid JSON; allowed: one object per line") from None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise RunError(f"{path} line {number}: no whole number 'step'; allowed: one object of metrics per line")
    for key, value in record.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise RunError(f"{path} line {number}: {key} is {value!r:.40}; allowed: a finite number")
    return record


def strict_json(text: str | bytes) -> Any:
    """The value in JSON text, without the NaN and Infinity that Python lets pass.

    Raises:
        ValueError: it is not JSON.
    """
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(step: int, key: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RunError(f"step {step}: metric '{key}' is {value!r:.40}; allowed: a finite number") from None
    if not math.isfinite(number):
        raise RunError(f"step {step}: metric '{key}' is {number}; allowed: a finite number")
    return number


def _event_writer(run_dir: Path) -> Any:
    """TensorBoard's own: that of torch would be all that the driver needs torch for, two seconds of it."""
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    return EventFileWriter(str(run_dir / TENSORBOARD_FOLDER))
