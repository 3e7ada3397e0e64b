"""Engine processes that end with the rollout actor that started them, however that one ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(pid: int | None = None) -> None:
    """Have this process killed when its parent dies; does nothing in one that multiprocessing did not start.

    vLLM's engine process does not watch who started it: after a SIGKILL of that one it would stay, with its memory.
    The kernel means the parent's *thread*: an engine is started in the thread of its actor's event loop, which
    lives as long as the actor.

    Args:
        pid: of the parent, where multiprocessing, which is still reading what to run, does not know it yet.

    Raises:
        OSError: the kernel refuses.
    """
    if pid is None:
        parent = multiprocessing.parent_process()
        if parent is None or parent.pid is None:
            return
        pid = parent.pid
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != pid:  # it died before
        os._exit(1)
