"""vLLM's executor for an engine of one worker, which leaves nothing behind when it is killed."""

from __future__ import annotations

import multiprocessing

from vllm.v1.executor.uniproc_executor import UniProcExecutor

from actors.lifeline import end_with_parent


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


end_with_parent()  # an engine process imports this first of all, when it reads what it is to run
