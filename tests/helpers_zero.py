"""ZeRO-3 ranks as scripts on the tiny model. `test_zero.py` and its neighbours start them with `run_ranks`."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import socket
import time
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.device import cpu_environment, local_device
from uniapl.config import Config
from uniapl.policy import PREFIX
from uniapl.records import Demonstration, Group, MixedBatch, Prompt, Sample, Score, VersionSpan
from uniapl.shares import share_out

LIMIT_S = 480
PRELOADED = [
    "deepspeed",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "learner.cotrained",
    "learner.diagnostics",
    "learner.step",
    "learner.universal",
]
WEIGHTED = {
    "preference": {"weight": 0.7},
    "demonstration": {"weight": 0.3},
    "adversarial": {"weight": 0.2, "discriminator": "embedding"},
}


def run_ranks(script: str, out: Path, ranks: int, spec: dict[str, Any]) -> Path:
    """Call `script`.main(spec, out, rank) in `ranks` processes that have joined; returns `out`.

    What they print stands in `out`/rank-N.log.
    """
    out.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    joined = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    processes = [
        rank_processes().Process(target=_start, args=(script, spec | {"ranks": ranks}, out, rank, joined), daemon=True)
        for rank in range(ranks)
    ]
    deadline = time.monotonic() + LIMIT_S
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(deadline - time.monotonic())
    finally:
        for process in processes:
            process.kill()
    logs = [path.read_text()[-3000:] for path in sorted(out.glob("rank-*.log"))]
    assert [process.exitcode for process in processes] == [0] * ranks, "\n".join(logs)
    return out


@cache
def rank_processes() -> ForkServerContext:
    """Processes forked from one that has imported what every rank needs, and done nothing else.

    Each rank is a process of its own all the same; only the imports, most of a rank's seconds, are shared.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cpu_environment().items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _start(script: str, spec: dict[str, Any], out: Path, rank: int, joined: dict[str, str]) -> None:
    """In the rank's process."""
    from learner.zero import join_ranks

    log = os.open(out / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(joined | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects at every start of an engine: the modules, which stay, need no look
    join_ranks(local_device(0), 120)
    importlib.import_module(script).main(spec, out, rank)


def config(model: str, objective: dict[str, Any] = WEIGHTED, **learner: object) -> Config:
    return Config.model_validate(
        {
            "model": {"path": model},
            "data": {"train": ["unused"], "max_prompt_tokens": 16, "max_response_tokens": 16},
            "rollout": {"max_tokens": 16, "temperature": 0.8, "max_model_len": 64},
            "objective": {"diagnostics_every": 0} | objective,
            "learner": {"dtype": "float32", "row_tokens": 4096, "learning_rate": 1e-2} | learner,
            "evaluation": {"prompts": 0},
        }
    )


def batch(step: int = 0, huge: float = 0.0) -> MixedBatch:
    """Three groups of four samples (one without an expert score) and five demonstrations, of uneven lengths.

    Args:
        huge: added to the reward of the first sample of the second group.
    """
    groups = []
    for g in range(3):
        samples = []
        for i in range(4):
            length = 1 + (5 * g + 3 * i) % 11
            ids = [20 + (7 * g + 3 * i + t) % 300 for t in range(length)]
            reward = float((g + i) % 3) + (huge if (g, i) == (1, 0) else 0.0)
            score = Score(reward=reward, expert_score=None if g == 2 else 0.1 * i)
            spans = [VersionSpan(0, length, 0)]
            samples.append(Sample(ids, [-5.0 - 0.1 * t for t in range(length)], spans, "", "stop", score))
        groups.append(Group(g, Prompt(f"p{g}", [], list(range(5, 9 + g))), samples, "a"))
    shown = [Demonstration(f"d{i}", [5, 6, 7 + i], [30 + i + t for t in range(2 + i)]) for i in range(5)]
    return MixedBatch(step, groups, shown)


def share(whole: MixedBatch, rank: int, ranks: int) -> MixedBatch:
    """This rank's part of a batch, as the learner group would give it."""
    tokens = [group.tokens for group in whole.groups]
    return MixedBatch(whole.step, *share_out(whole.groups, tokens, whole.demonstrations, ranks)[rank])


def full_gradients(engine: Any) -> dict[str, torch.Tensor]:
    """By the parameter's name in the Hugging Face model; a collective."""
    from deepspeed.utils import safe_get_full_grad

    found = {name.removeprefix(PREFIX): safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items()}


def full_weights(engine: Any) -> torch.Tensor:
    """The float32 master weights end to end; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    return torch.cat([safe_get_full_fp32_param(p).flatten() for p in engine.module.parameters()])


def open_engine(c: Config, ranks: int, model: str | None = None) -> tuple[Any, Any]:
    """The policy's engine and, where the configuration weighs it, the reference's."""
    from learner.device import local_device
    from learner.zero import build_engine, build_reference
    from uniapl.policy import load_policy

    policy = load_policy(model or c.model.path, c.learner.activation_checkpointing)
    device = local_device(0)
    engine = build_engine(policy, c.learner, ranks, device)
    if not c.objective.kl.weight.ever_positive:
        return engine, None
    return engine, build_reference(load_policy(c.objective.kl.reference or c.model.path), c.learner, ranks, device)
