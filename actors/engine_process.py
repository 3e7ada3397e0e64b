"""The main module of an engine's process, in place of that of Ray's worker which starts it.

multiprocessing imports the main module of the process that starts another one in the new one, before all else.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

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


@contextmanager
def sockets() -> Iterator[None]:
    """An engine that starts in the body, and answers there, has its sockets in a folder of their own, which then goes.

    vLLM would leave them in the system's folder for temporary files for ever. Once connected they need no name, which
    an answer shows: a process that has not come to it yet would look for them in vain, and for ever.
    """
    with TemporaryDirectory(prefix="uniapl-") as folder:
        os.environ["VLLM_RPC_BASE_PATH"] = folder
        yield


if __name__ == "__mp_main__":
    end_with_parent(os.getppid())
    with importing():
        import vllm.v1.engine.core  # noqa: F401
