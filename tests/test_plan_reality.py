"""The plan against real ZeRO-3 ranks: SmolLM2 on a CPU, in processes like the learner's."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_cli import environment

from learner.device import cpu_environment
from uniapl.config import load_config
from uniapl.plan.fit import Machines
from uniapl.plan.pace import Rates
from uniapl.plan.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "local.yaml"


@pytest.mark.parametrize(
    ("ranks", "every"),
    [
        pytest.param(1, 13, id="one rank, every term measured"),
        pytest.param(2, 0, id="two ranks, none measured", marks=pytest.mark.chaos),
    ],
)
def test_memory_and_broadcast_of_real_ranks_are_within_15_percent_of_the_plan(
    smollm2: Path, ranks: int, every: int
) -> None:
    overrides = [f"model.path={smollm2}", f"objective.diagnostics_every={every}", f"learner.ranks={ranks}"]
    plan = make_plan(load_config(CONFIG, overrides), Machines(gpus=0), Rates())
    found = measured(overrides, ranks, cpu_environment() | {"CUDA_VISIBLE_DEVICES": ""})
    assert [one["peak"] for one in found] == pytest.approx([plan.learner_bytes] * ranks, rel=0.15)
    assert plan.broadcast_bytes == pytest.approx(found[0]["sent"], rel=0.001)  # and checksums


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here; not run anywhere yet (docs/plan.md)")
def test_memory_of_a_real_rank_on_a_gpu_is_within_15_percent_of_the_plan(smollm2: Path) -> None:
    """Of what PyTorch allocates: without CUDA's context, which the plan counts with the process itself."""
    overrides = [f"model.path={smollm2}", "objective.diagnostics_every=13"]
    plan = make_plan(load_config(CONFIG, overrides), Machines(gpus=2), Rates())
    allocated = sum(part.bytes for part in plan.learner if part.name != "the process itself")
    assert measured(overrides, 1, {})[0]["peak"] == pytest.approx(allocated, rel=0.15)


def measured(overrides: list[str], ranks: int, own: dict[str, str]) -> list[dict[str, float]]:
    """What each of so many ranks says, see plan_rank.py."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    words = [sys.executable, str(ROOT / "tests" / "plan_rank.py"), str(CONFIG), *overrides]
    group = {"WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    every = environment() | own | group
    started = [
        subprocess.Popen(
            words, env=every | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    try:
        told = [process.communicate(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * ranks, [errors[-3000:] for _, errors in told]
    return [json.loads(output.splitlines()[-1]) for output, _ in told]
