"""What ends a run is told in one line, and a mistake in the code keeps its traceback.

Actors that do nothing stand in for the run's parts, because only their death matters; `chaos/test_faults_short.py`
kills the real ones.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ObjectStoreFullError, RayTaskError

from cluster.checkpoints import save_checkpoint
from cluster.failures import told_in_one_line
from cluster.step import _follow, one_step
from cluster.system import System
from uniapl.broadcast_result import BroadcastError
from uniapl.config import ObjectiveConfig
from uniapl.config_errors import ConfigError
from uniapl.objective.controllers import Controllers
from uniapl.runlog import RunError


class Part:
    async def usage(self) -> int:
        return 0

    async def address(self) -> int:
        return 0

    async def work(self) -> None:
        os._exit(1)

    async def hang(self) -> None:
        await asyncio.sleep(600)

    async def fail(self) -> None:
        raise ConnectionError("closed by peer")


@pytest.fixture(scope="module")
def parts(ray_session: Any) -> tuple[Any, Any]:
    """A queue and a rank that live."""
    actor = ray.remote(num_cpus=0)(Part)
    made = actor.remote(), actor.remote()
    ray.get([made[0].usage.remote(), made[1].address.remote()])
    return made


def told(queue: Any, ranks: list[Any], folder: Path, do: Callable[[], Any]) -> str:
    system = SimpleNamespace(queue=queue, learner=SimpleNamespace(ranks=ranks))
    system.gone = lambda: System.gone(system)  # type: ignore[arg-type]
    with pytest.raises(RunError) as error, told_in_one_line(system, folder):  # type: ignore[arg-type]
        do()
    assert "\n" not in str(error.value)
    return str(error.value)


def raises(error: BaseException) -> Callable[[], Any]:
    def do() -> None:
        raise error

    return do


def test_a_dead_rank_is_named_though_another_failed_first(parts: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, 1, lambda place: None)
    queue, alive = parts
    dying = ray.remote(num_cpus=0)(Part).remote()

    def do() -> None:
        call = dying.work.remote()
        ray.wait([call])
        ray.get(alive.fail.remote())

    line = told(queue, [alive, dying], tmp_path, do)
    assert line == "learner rank 1 died; --resume goes on from step-00004"


def test_an_error_of_the_code_stays_what_it_is(parts: Any, tmp_path: Path) -> None:
    _, alive = parts
    system = SimpleNamespace(gone=list)
    with pytest.raises(RayTaskError, match="closed by peer"), told_in_one_line(system, tmp_path):  # type: ignore[arg-type]
        ray.get(alive.fail.remote())
    with pytest.raises(ConfigError, match="its own"), told_in_one_line(system, tmp_path):  # type: ignore[arg-type]
        raise ConfigError("its own")


def test_no_answer_in_time_and_no_room_are_one_line(parts: Any, tmp_path: Path) -> None:
    queue, alive = parts
    no_checkpoint = "; there is no checkpoint to go on from"
    late = told(queue, [alive], tmp_path, raises(TimeoutError("no batch within 5 s (cluster.step_timeout_s)")))
    assert late == f"TimeoutError: no batch within 5 s (cluster.step_timeout_s){no_checkpoint}"
    sent = told(queue, [alive], tmp_path, raises(BroadcastError("the nccl group was not formed within 4 s")))
    assert sent == f"BroadcastError: the nccl group was not formed within 4 s{no_checkpoint}"
    store = told(queue, [alive], tmp_path, raises(ObjectStoreFullError("no room for 8 MiB")))
    assert store.startswith("Ray's object store is full (cluster.object_store_gib), and so is the disk below it: ")


def test_a_queue_that_does_not_run_is_told_after_the_time_of_a_step(parts: Any, tmp_path: Path) -> None:
    queue, alive = parts
    system = SimpleNamespace(config=SimpleNamespace(cluster=SimpleNamespace(step_timeout_s=0.2)))
    late = told(queue, [alive], tmp_path, lambda: System.answer(system, queue.hang.remote()))  # type: ignore[arg-type]
    assert late.startswith("TimeoutError: the queue gave no answer within 0.2 s (cluster.step_timeout_s); there is no")


def test_a_batch_of_another_step_is_one_line_that_says_where_the_run_goes_on(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, 1, lambda place: None)
    system: Any = SimpleNamespace(next_batch=lambda: SimpleNamespace(step=6))
    nothing: Any = None
    with pytest.raises(RunError) as error:
        one_step(system, nothing, tmp_path, 4, nothing)
    assert str(error.value) == "step 5: the queue gave the batch of step 7; --resume goes on from step-00004"


def test_a_weight_that_cannot_follow_is_one_line_that_names_the_batch() -> None:
    lagrangian = {"preference": {"weight": 1.0}, "kl": {"weight": {"kind": "lagrangian"}}}
    controllers = Controllers(ObjectiveConfig.model_validate(lagrangian))
    with pytest.raises(RunError) as error:
        _follow(controllers, 4, {"kl/reference": math.nan}, Path("runs/r/batches/step-00004.arrow"))
    assert str(error.value) == (
        "step 5: kl/reference is nan, the kl weight cannot follow it; the batch is in runs/r/batches/step-00004.arrow; "
        "`uniapl replay runs/r 5` makes the step again"
    )


def test_a_part_at_work_is_not_taken_for_dead(ray_session: Any) -> None:
    @ray.remote(num_cpus=0)
    class Busy:
        def usage(self) -> int:
            return 0

        def work(self) -> None:
            time.sleep(8)

    queue = Busy.remote()
    ray.get(queue.usage.remote())
    queue.work.remote()
    system = SimpleNamespace(queue=queue, learner=SimpleNamespace(ranks=[]))
    assert System.gone(system) == []  # type: ignore[arg-type]
