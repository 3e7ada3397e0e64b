"""vLLM's executor for an engine of one worker, which leaves nothing behind when it is killed."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import sys

from vllm.v1.executor.uniproc_executor import UniProcExecutor


class InProcessExecutor(UniProcExecutor):
    """The worker in the engine's own process.

    vLLM's engine process is spawned, and in a spawned process multiprocessing's locks (one of vLLM's own, one
    of tqdm's) are named semaphores in /dev/shm until the process that started it has tidied up. A SIGKILL of
    that one leaves them. In a forking context the name is taken away as soon as the lock is made. Nothing here
    starts a process with them.
    """

    def _init_executor(self) -> None:
        multiprocessing.set_start_method("fork", force=True)
        super()._init_executor()

    def shutdown(self) -> None:
        """The process ends right after it: to look for garbage in it first, as vLLM and Python would, takes 3 s."""
        gc.collect = lambda generation=2: 0
        if sys.exc_info()[0] in (None, SystemExit):
            atexit.register(os._exit, 0)
        super().shutdown()
