"""The main module of an engine's process, in place of that of Ray's worker which starts it.

multiprocessing imports the main module of the process that starts another one in the new one, before all else.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from actors.lifeline import end_with_parent
from uniapl.imports import importing


@contextmanager
def spawned() -> Iterator[None]:
    """Processes that are started in the body have this module as their main module, and so do those they start."""
    main = sys.modules["__main__"]
    own, main.__spec__ = main.__spec__, importlib.util.find_spec(__name__)
    try:
        yield
    finally:
        main.__spec__ = own


if __name__ == "__mp_main__":
    end_with_parent(os.getppid())
    with importing():
        import vllm.v1.engine.core  # noqa: F401
