"""A process like a rollout actor's, with one like its engine's. Imports little, because both start anew."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

from actors.lifeline import end_with_parent


def engine(pids: Any) -> None:
    end_with_parent()
    pids.put(os.getpid())
    time.sleep(60)


def actor(pids: Any) -> None:
    multiprocessing.get_context("spawn").Process(target=engine, args=(pids,)).start()
    time.sleep(60)
