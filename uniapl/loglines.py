"""Log lines that say where they come from: every line of a process begins with run, step and actor."""

from __future__ import annotations

import logging

_FORMAT = "%(asctime)s %(levelname)s run=%(run)s step=%(step)s actor=%(actor)s %(name)s: %(message)s"


class LogLines(logging.Formatter):
    """The prefix of this process's lines; `step` is the optimizer step under way, from 1, None before the first."""

    def __init__(self, run: str, actor: str) -> None:
        super().__init__(_FORMAT)
        self._run = run
        self._actor = actor
        self.step: int | None = None

    def format(self, record: logging.LogRecord) -> str:
        record.run, record.actor = self._run, self._actor
        record.step = "-" if self.step is None else self.step
        return super().format(record)


def log_lines(run: str, actor: str) -> LogLines:
    """Give this process's log lines their prefix; they go to stderr, which Ray keeps in a file for every worker.

    Where somebody has said before what becomes of log lines, as pytest does, it stays so.

    Args:
        run: `run.name`.
        actor: what runs in the process, such as `rollout-0` or `queue`.
    """
    lines = LogLines(run, actor)
    handler = logging.StreamHandler()
    handler.setFormatter(lines)
    logging.basicConfig(handlers=[handler])
    return lines
