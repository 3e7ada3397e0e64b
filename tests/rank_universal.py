"""Ranks that step, save, and load what another number of ranks saved. Started by test_universal.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers_cotrained
import torch
import torch.distributed as dist
from helpers_zero import batch, config, open_engine, share

from learner.checkpoint import load_engine, save_engine
from learner.cotrained import CotrainedDiscriminator
from learner.device import local_device
from learner.step import train_step
from learner.universal import write_universal
from learner.zero_files import UNIVERSAL
from uniapl.objective.controllers import Controllers

DECAY = 0.1
"""Makes two parameter groups: matrices and vectors."""


def main(spec: dict[str, Any], out: Path, rank: int) -> None:
    ranks = spec["ranks"]
    c = config(spec["model"], weight_decay=DECAY)
    engine, _ = open_engine(c, ranks)
    other = helpers_cotrained.config(spec["model"], ranks, 4096, weight_decay=DECAY)
    discriminator = CotrainedDiscriminator(other, local_device(0), ranks)
    found: dict[str, Any] = {}
    if spec["load"]:
        place = Path(spec["load"] + UNIVERSAL)
        if rank == 0:
            write_universal(Path(spec["load"]), place)
        dist.barrier()
        load_engine(engine, place)
        discriminator.load(place)
        found["loaded"] = whole_state(engine) | whole_state(discriminator._engine)
        found["weights"] = weights(engine)
    losses = []
    for step in range(spec["first"], spec["first"] + 2):
        chosen = Controllers(c.objective).weights(step)
        metrics = train_step(engine, share(batch(step), rank, ranks), c, chosen, 1e-2, "cpu")
        learned = helpers_cotrained.score_and_train(discriminator, helpers_cotrained.groups(step)[rank::ranks], step)
        losses.append((metrics["loss/total"], learned["discriminator/loss"]))
    save_engine(engine, out)
    discriminator.save(out)
    found |= {"losses": losses, "saved": whole_state(engine) | whole_state(discriminator._engine)}
    torch.save(found, out / f"found-{rank}.pt")


def whole_state(engine: Any) -> dict[str, Any]:
    """Master, both moments and counter of every parameter, and the decay it gets. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer, state = engine.optimizer, {}
    for number, group in enumerate(optimizer.fp16_groups):
        settings = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[number]]
        flat = optimizer.fp32_partitioned_groups_flat[number]
        for parameter in group:
            name = engine.param_names[parameter]
            state[f"{name}/fp32"] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
            state[f"{name}/step"] = torch.as_tensor(optimizer.optimizer.state[flat]["step"]).clone()
            state[f"{name}/decay"] = torch.tensor(settings["weight_decay"], dtype=torch.float64)
    return state


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """What the forward pass computes with. A collective."""
    return {f"{name}/fp32": value for name, value in helpers_cotrained.full_parameters(engine).items()}
