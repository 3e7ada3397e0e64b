"""What is told of a system that cannot go on: one line that says what was lost and where `--resume` goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from cluster.checkpoints import kept
from cluster.fleet import one_line
from cluster.system import System
from uniapl.config_errors import ConfigError
from uniapl.data.errors import DataError
from uniapl.runlog import RunError


class PartLostError(RunError):
    """The running system cannot go on, but one that is started again could; `reason` is one line."""

    def __init__(self, reason: str, folder: Path) -> None:
        super().__init__(f"{reason}; {kept(folder)}")
        self.reason = reason


@contextmanager
def told_in_one_line(system: System, folder: Path) -> Iterator[None]:
    """Around all that a started system does; an error that comes from a mistake in the code stays as it is.

    Raises:
        PartLostError: a part of the system died, gave no answer in time, or found no room in Ray's store.
    """
    try:
        yield
    except (ConfigError, DataError, RunError):
        raise
    except (RayError, TimeoutError) as error:
        line = _line(error, system.gone() if isinstance(error, RayError) else [])
        if line is None:
            raise
        raise PartLostError(line, folder) from None


def _line(error: Exception, gone: list[str]) -> str | None:
    if gone:  # what others ran into then is its consequence, such as a collective without one of the ranks
        return f"{' and '.join(gone)} died"
    if isinstance(error, RayTaskError):
        return None
    if isinstance(error, ObjectStoreFullError | OutOfDiskError):
        return f"Ray's object store is full (cluster.object_store_gib), and so is the disk below it: {one_line(error)}"
    return one_line(error)
