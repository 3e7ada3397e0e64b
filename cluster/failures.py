"""What a run that cannot go on tells its user: one line that says what was lost and where `--resume` goes on."""

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


@contextmanager
def told_in_one_line(system: System, folder: Path) -> Iterator[None]:
    """Around all that a started system does; an error that comes from a mistake in the code stays as it is.

    Raises:
        RunError: a part of the system died, gave no answer in time, or found no room in Ray's store.
    """
    try:
        yield
    except (ConfigError, DataError, RunError):
        raise
    except (RayError, TimeoutError) as error:
        line = _line(error, system.gone() if isinstance(error, RayError) else [])
        if line is None:
            raise
        raise RunError(f"{line}; {kept(folder)}") from None


def _line(error: Exception, gone: list[str]) -> str | None:
    if gone:  # what others ran into then is its consequence, such as a collective without one of the ranks
        return f"{' and '.join(gone)} died, and the run cannot go on without"
    if isinstance(error, RayTaskError):
        return None
    if isinstance(error, ObjectStoreFullError | OutOfDiskError):
        return f"Ray's object store is full (cluster.object_store_gib), and so is the disk below it: {one_line(error)}"
    return one_line(error)
