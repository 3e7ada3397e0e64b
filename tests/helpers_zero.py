"""ZeRO-3 ranks as scripts on the tiny model. `test_zero.py` and its neighbours start them with `run_ranks`."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from uniapl.config import Config
from uniapl.packing import partition
from uniapl.policy import PREFIX
from uniapl.records import Demonstration, Group, MixedBatch, Prompt, Sample, Score, VersionSpan

ROOT = Path(__file__).resolve().parent.parent
WEIGHTED = {
    "preference": {"weight": 0.7},
    "demonstration": {"weight": 0.3},
    "adversarial": {"weight": 0.2, "discriminator": "embedding"},
}


def run_ranks(script: str, out: Path, ranks: int, spec: dict[str, Any]) -> Path:
    """Call `script`.main(spec, out, rank) in `ranks` processes that have joined; returns `out`."""
    out.mkdir(parents=True)
    (out / "spec.json").write_text(json.dumps(spec | {"ranks": ranks}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, script, str(out)],
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        logs = [p.communicate(timeout=240)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0] * ranks, "\n".join(log[-3000:] for log in logs)
    return out


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
    items = [*whole.groups, *whole.demonstrations]
    costs = [i.tokens if isinstance(i, Group) else len(i.prompt_ids) + len(i.response_ids) for i in items]
    mine = [items[i] for i in partition(costs, ranks)[rank]]
    groups = [i for i in mine if isinstance(i, Group)]
    return MixedBatch(whole.step, groups, [i for i in mine if isinstance(i, Demonstration)])


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
    from learner.zero import build_engine, build_reference
    from uniapl.policy import load_policy

    policy = load_policy(model or c.model.path, c.learner.activation_checkpointing)
    engine = build_engine(policy, c.learner, ranks)
    if not c.objective.kl.weight.ever_positive:
        return engine, None
    return engine, build_reference(load_policy(c.objective.kl.reference or c.model.path), c.learner, ranks)


def _start(script: str, out: Path) -> None:
    from learner.device import local_device
    from learner.zero import join_ranks

    torch.set_num_threads(1)
    join_ranks(local_device(0), 120)
    spec = json.loads((out / "spec.json").read_text())
    importlib.import_module(script).main(spec, out, int(os.environ["RANK"]))


if __name__ == "__main__":
    _start(sys.argv[1], Path(sys.argv[2]))
