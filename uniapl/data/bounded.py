"""A limit on time and memory for code that came with data, by a child process that can be killed."""

from __future__ import annotations

import os
import resource
import select
import signal
from collections.abc import Callable
from typing import NoReturn

_MAX_ANSWER = 4096
"""Bytes: what a pipe takes at once."""


class ExceededError(Exception):
    """The call took more time or memory than it may."""


def bounded(function: Callable[[], str], seconds: float, memory: int) -> str:
    """The first 4096 bytes of what `function` returns in a forked child.

    Args:
        function: must not need threads of this process, which a child does not have.
        seconds: after which the child is killed.
        memory: bytes that the child may take beyond what this process has.

    Raises:
        ExceededError: it ran into one of the two limits; also where it ended its process or raised.
    """
    answer, sink = os.pipe()
    child = os.fork()
    if child == 0:
        _work(function, sink, memory)
    os.close(sink)
    try:
        ready, _, _ = select.select([answer], [], [], seconds)
        if not ready:
            raise ExceededError(f"took longer than {seconds:g} s")
        text = os.read(answer, _MAX_ANSWER)
    finally:
        os.close(answer)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not text:
        raise ExceededError(f"took more than {memory >> 20} MiB of memory, or ended its process")
    return text[1:].decode("utf-8", "replace")


def _work(function: Callable[[], str], sink: int, memory: int) -> NoReturn:
    """In the child: one write, which begins with a byte of its own, or none."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
        text = function()
        os.write(sink, b"=" + text.encode("utf-8", "replace")[: _MAX_ANSWER - 1])
    finally:
        os._exit(0)  # nothing of the parent's is flushed or cleaned up twice
