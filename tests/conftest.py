"""Fixtures that the whole suite shares, so that heavy start-ups are paid once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A slow machine is no failure; in CI the same examples are tried every time.
settings.register_profile("suite", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("suite")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

ROOT = Path(__file__).resolve().parent.parent
LOGICAL_CPUS = 16
"""Far more than there are: Ray only counts them, and the suite must not wait for a free one."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random chat model (untied output layer)."""
    from helpers_tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of configs/local.yaml: that of `make run`, or one that is made from its package here."""
    from uniapl.data.local_model import is_whole, prepare_model

    there = ROOT / "models" / "SmolLM2-135M-Instruct"
    return there if is_whole(there) else prepare_model(tmp_path_factory.mktemp("converted") / "smollm2")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """One real Ray for every test that needs one."""
    import ray

    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    ray.init(
        address="local",
        num_cpus=LOGICAL_CPUS,
        include_dashboard=False,
        object_store_memory=256 << 20,
        runtime_env={"env_vars": environment},
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()
