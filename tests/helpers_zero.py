"""One ZeRO-3 rank as a script: gradients, a step, a checkpoint, on the tiny model. Started by test_zero.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from learner import checkpoint
from learner.device import local_device
from learner.step import _all_sum, _run_micro_batches, plan_micro_batches, train_step
from learner.zero import build_engine, join_ranks
from uniapl.config import Config
from uniapl.objective.rows import count_tokens
from uniapl.objective.sequences import training_sequences
from uniapl.packing import partition
from uniapl.policy import PREFIX, load_policy
from uniapl.records import Demonstration, Group, MixedBatch, Prompt, Sample, Score, VersionSpan


def config(model: str, ranks: int, row_tokens: int, **learner: object) -> Config:
    return Config.model_validate(
        {
            "model": {"path": model},
            "data": {"train": ["unused"], "max_prompt_tokens": 16, "max_response_tokens": 16},
            "rollout": {"max_tokens": 16, "temperature": 0.8, "max_model_len": 64},
            "objective": {
                "preference": {"weight": 0.7},
                "demonstration": {"weight": 0.3},
                "adversarial": {"weight": 0.2, "discriminator": "embedding"},
            },
            "learner": {"ranks": ranks, "dtype": "float32", "row_tokens": row_tokens} | learner,
            "evaluation": {"prompts": 0},
        }
    )


def batch() -> MixedBatch:
    """Three groups of four samples (one without an expert score) and five demonstrations, of uneven lengths."""
    groups = []
    for g in range(3):
        samples = []
        for i in range(4):
            length = 1 + (5 * g + 3 * i) % 11
            ids = [20 + (7 * g + 3 * i + t) % 300 for t in range(length)]
            score = Score(reward=float((g + i) % 3), expert_score=None if g == 2 else 0.1 * i)
            spans = [VersionSpan(0, length, 0)]
            samples.append(Sample(ids, [-5.0 - 0.1 * t for t in range(length)], spans, "", "stop", score))
        groups.append(Group(g, Prompt(f"p{g}", [], list(range(5, 9 + g))), samples, "a"))
    shown = [Demonstration(f"d{i}", [5, 6, 7 + i], [30 + i + t for t in range(2 + i)]) for i in range(5)]
    return MixedBatch(0, groups, shown)


def share(rank: int, ranks: int) -> MixedBatch:
    """This rank's part of `batch()`, as the learner group would give it."""
    whole = batch()
    items = [*whole.groups, *whole.demonstrations]
    costs = [i.tokens if isinstance(i, Group) else len(i.prompt_ids) + len(i.response_ids) for i in items]
    mine = [items[i] for i in partition(costs, ranks)[rank]]
    return MixedBatch(0, [i for i in mine if isinstance(i, Group)], [i for i in mine if isinstance(i, Demonstration)])


def full_gradients(engine: torch.nn.Module) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    found = {name.removeprefix(PREFIX): safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items()}


def main(model: str, out: str, ranks: int, rank: int, row_tokens: int) -> None:
    torch.set_num_threads(1)
    join_ranks(local_device(0), 120)
    c = config(model, ranks, row_tokens)
    engine = build_engine(load_policy(model), c.learner, ranks)
    mine = share(rank, ranks)
    sequences = training_sequences(mine, c.objective, c.rollout.temperature)
    counts = _all_sum(count_tokens(sequences), "cpu")
    _run_micro_batches(engine, plan_micro_batches(sequences, c.learner, "cpu"), counts, c, "cpu")
    gradients = full_gradients(engine)
    engine.step()
    folder = Path(out)
    checkpoint.save_engine(engine, folder)
    first = train_step(engine, mine, c, 1e-3, "cpu")
    again = build_engine(load_policy(model), c.learner, ranks)
    checkpoint.load_engine(again, folder)
    second = train_step(again, mine, c, 1e-3, "cpu")
    checkpoint.export_model(again, model, folder / "model", rank)
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")
        (folder / "steps.json").write_text(json.dumps([first, second]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
