"""One rank of a cotrained discriminator, on the tiny model and toy groups. Started by test_cotrained.py."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from uniapl.config import Config
from uniapl.records import Group, Prompt, Sample, Score, VersionSpan, expert_scores

LEARN_STEPS = 25
POISONED = 383
"""A token that stands in one prompt alone."""


def config(model: str, ranks: int, row_tokens: int, **learner: object) -> Config:
    return Config.model_validate(
        {
            "model": {"path": model},
            "data": {"train": ["unused"], "max_prompt_tokens": 16, "max_response_tokens": 16},
            "rollout": {"max_tokens": 16, "max_model_len": 64},
            "objective": {
                "adversarial": {
                    "weight": 0.2,
                    "discriminator": "cotrained",
                    "cotrained": {"learning_rate": 1e-3},
                },
            },
            "learner": {"ranks": ranks, "dtype": "float32", "row_tokens": row_tokens} | learner,
            "evaluation": {"prompts": 0},
        }
    )


def group(lease: int, draw: random.Random, paired: bool = True, samples: int = 4) -> Group:
    """Experts use tokens from 200 on, samples tokens below 120; lengths are uneven."""

    def some(first: int, last: int) -> list[int]:
        return [draw.randrange(first, last) for _ in range(draw.randrange(1, 12))]

    made = []
    for _ in range(samples):
        ids = some(20, 120)
        made.append(Sample(ids, [-1.0] * len(ids), [VersionSpan(0, len(ids), 0)], "", "stop", Score(0.0)))
    expert = some(200, 300) if paired else None
    return Group(lease, Prompt(f"p{lease}", [], some(120, 200), None, "text" if paired else None, expert), made, "a")


def groups(step: int) -> list[Group]:
    """Four groups with an expert's response and one without."""
    draw = random.Random(step)
    return [group(10 * step + i, draw, paired=i != 2) for i in range(5)]


def share(step: int, rank: int, ranks: int) -> list[Group]:
    """This rank's part of `groups(step)`; in step 1 rank 0 has all of it."""
    return groups(step) if step == 1 and rank == 0 else [] if step == 1 else groups(step)[rank::ranks]


def full_parameters(engine: Any) -> dict[str, torch.Tensor]:
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def score_and_train(discriminator: Any, mine: list[Group], step: int) -> dict[str, float]:
    metrics = discriminator.score(mine, step)
    discriminator.step()
    return metrics


def first_step(discriminator: Any, mine: list[Group]) -> tuple[dict[str, float], dict[str, torch.Tensor], float]:
    """A step, the whole gradient that it used, and the norm of it that DeepSpeed found."""
    from deepspeed.utils import safe_get_full_grad

    engine, gradients = discriminator._engine, {}
    step = engine.step

    def spy() -> None:  # the step forgets the gradient
        gradients.update({name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()})
        step()

    engine.step = spy
    metrics = score_and_train(discriminator, mine, 0)
    engine.step = step
    return metrics, gradients, float(engine.get_global_grad_norm())


def poisoned_step(discriminator: Any, rank: int, ranks: int) -> tuple[str, bool]:
    """What a step says when one prompt's embedding is NaN, and whether it left the weights as they were."""
    import deepspeed

    from learner.nonfinite import NonFiniteError

    engine = discriminator._engine
    embedding = engine.module.backbone.get_input_embeddings().weight
    with deepspeed.zero.GatheredParameters([embedding], modifier_rank=0):
        if rank == 0:
            embedding.data[POISONED] = float("nan")
    before = full_parameters(engine)
    batch = groups(99)
    batch[3].prompt.token_ids[:] = [POISONED]
    try:
        score_and_train(discriminator, batch[rank::ranks], 99)
    except NonFiniteError as error:
        after = full_parameters(engine)
        return str(error), all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)
    return "no error", False


def warm_config(c: Config, comparisons: str) -> Config:
    """The same with a warm-up of two steps on preference pairs, four in each."""
    tree = c.model_dump()
    tree["objective"]["adversarial"]["cotrained"] |= {"comparisons": [comparisons], "warmup_steps": 2}
    tree["data"]["max_prompt_tokens"] = 48
    tree["queue"]["groups_per_step"] = 1
    return Config.model_validate(tree)


def warm_up(c: Config, device: Any, rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Three steps with a warm-up of two; the second and the third again from a checkpoint."""
    from learner.cotrained import CotrainedDiscriminator

    warm = CotrainedDiscriminator(c, device, ranks)
    metrics = [score_and_train(warm, share(0, rank, ranks), 0)]
    warm.save(folder)
    metrics += [score_and_train(warm, share(0, rank, ranks), step) for step in (1, 2)]
    again = CotrainedDiscriminator(c, device, ranks)
    again.load(folder)
    resumed = [score_and_train(again, share(0, rank, ranks), step) for step in (1, 2)]
    alone = score_and_train(again, [], 1)
    return {"metrics": metrics, "resumed": resumed, "alone": alone}


def main(spec: dict[str, Any], folder: Path, rank: int) -> None:
    from learner.cotrained import CotrainedDiscriminator
    from learner.device import local_device

    device, ranks = local_device(0), spec["ranks"]
    c = config(spec["model"], ranks, spec["row_tokens"], **spec["learner"])
    discriminator = CotrainedDiscriminator(c, device, ranks)
    metrics, scores = [], {}
    for step in range(3):
        mine = share(step, rank, ranks)
        if step == 0:
            found, gradients, norm = first_step(discriminator, mine)
            metrics.append(found)
        else:
            metrics.append(score_and_train(discriminator, mine, step))
        scores |= expert_scores(mine)
    before = full_parameters(discriminator._engine)
    unpaired = [group(1, random.Random(0), paired=False)] if rank == 0 else []
    without = score_and_train(discriminator, unpaired, 3)
    after = full_parameters(discriminator._engine)
    discriminator.save(folder)
    undisturbed = [score_and_train(discriminator, share(step, rank, ranks), step) for step in range(3, 5)]
    again = CotrainedDiscriminator(c, device, ranks)
    again.load(folder)
    resumed = [score_and_train(again, share(step, rank, ranks), step) for step in range(3, 5)]
    learned = [score_and_train(again, share(step, rank, ranks), step) for step in range(5, 5 + LEARN_STEPS)]
    warmed = warm_up(warm_config(c, spec["comparisons"]), device, rank, ranks, folder / "warm")
    error, untouched = poisoned_step(again, rank, ranks)
    (folder / f"rank-{rank}.json").write_text(
        json.dumps(
            {
                "metrics": metrics,
                "scores": scores,
                "norm": norm,
                "without": without,
                "unchanged": all(torch.equal(before[k], after[k]) for k in before),
                "undisturbed": undisturbed,
                "resumed": resumed,
                "learned": learned,
                "warm": warmed,
                "error": error,
                "untouched": untouched,
            }
        )
    )
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")
