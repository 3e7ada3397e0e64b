"""Engine and learner in turns on one GPU: what is allowed, where they are placed, and what a plan says of it."""

from __future__ import annotations

from typing import Any

import pytest
from test_plan import BILLION, settings

from actors.engine import _options
from cluster.placement import Site, engine_bundle, rank_bundle
from cluster.room import needs
from uniapl.config import Config
from uniapl.plan.engine import engine_memory
from uniapl.plan.fit import GIB, Machines, misfits
from uniapl.plan.learner import LearnerModels


def shared(**sections: dict[str, Any]) -> Config:
    sections["rollout"] = {"colocate": True, "gpu_memory_utilization": 0.4} | sections.get("rollout", {})
    return settings(**sections)


@pytest.mark.parametrize(
    ("section", "key", "value", "only"),
    [
        ("queue", "max_staleness", 1, 0),
        ("evaluation", "every", 2, 0),
        ("learner", "ranks", 2, 1),
        ("rollout", "actors", 2, 1),
        ("rollout", "max_actors", 3, 1),
        ("rollout", "tensor_parallel", 2, 1),
    ],
)
def test_what_would_have_both_at_work_at_once_is_refused(section: str, key: str, value: int, only: int) -> None:
    with pytest.raises(ValueError) as error:
        shared(**{section: {key: value}})
    assert f"{section}.{key}: got {value}; allowed: {only} when rollout.colocate is true" in str(error.value)


def test_both_take_half_of_a_gpu_and_neither_is_led_to_engines_nodes() -> None:
    site = Site(gpu=True, kinds=frozenset({"learner", "rollout"}))
    assert engine_bundle(shared(), site) == {"CPU": 1.0, "GPU": 0.5}
    assert rank_bundle(shared(), site) == {"CPU": 1.0, "GPU": 0.5, "learner": 1.0}
    assert engine_bundle(shared(), Site()) == rank_bundle(shared(), Site()) == {"CPU": 1.0}
    together: float = sum(need.bundle["GPU"] * need.times for need in needs(shared(), site))
    assert together == 1.0


def test_only_an_engine_that_shares_a_gpu_can_sleep() -> None:
    assert _options(shared(), gpu=True)["enable_sleep_mode"]
    assert not _options(settings(), gpu=True)["enable_sleep_mode"]
    assert "enable_sleep_mode" not in _options(shared(), gpu=False), "vLLM refuses it on CPUs"


def said(config: Config, gib: float) -> list[str]:
    found = misfits(config, LearnerModels(BILLION), engine_memory(config, BILLION, gib * GIB), Machines(1, 8, gib))
    return [str(misfit) for misfit in found]


def test_a_plan_wants_room_for_each_beside_what_the_other_keeps() -> None:
    assert said(shared(), 80) == []
    [line] = said(shared(rollout={"gpu_memory_utilization": 0.9}), 80)
    assert "an engine with 90% of a GPU of 80 GiB beside a resting learner of" in line
    change, share = line.rsplit(" ", 1)
    assert change.endswith("change rollout.gpu_memory_utilization to")
    assert said(shared(rollout={"gpu_memory_utilization": float(share)}), 80) == []


def test_a_learner_that_fits_only_without_the_sleeping_engine_is_named() -> None:
    alone = next(gib for gib in range(10, 80) if not any("learner rank" in line for line in said(shared(), gib)))
    lines = [line for gib in (alone - 1, alone - 0.5) for line in said(shared(), gib)]
    assert any("a learner rank and a sleeping engine" in line for line in lines)
    assert not any("learner.ranks" in line for line in lines), "there is one GPU"
