"""A process like a rollout actor's, with one like its engine's. Imports little, because both start anew."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

from actors.engine_process import spawned
from actors.lifeline import end_with_parent


def engine(pids: Any) -> None:
    end_with_parent()
    pids.put(os.getpid())
    time.sleep(60)


def engine_that_does_nothing_for_it(pids: Any) -> None:
    pids.put(os.getpid())
    time.sleep(60)


def actor(pids: Any) -> None:
    multiprocessing.get_context("spawn").Process(target=engine, args=(pids,)).start()
    time.sleep(60)


def actor_whose_engine_has_the_main_module(pids: Any) -> None:
    with spawned():
        multiprocessing.get_context("spawn").Process(target=engine_that_does_nothing_for_it, args=(pids,)).start()
    time.sleep(60)
