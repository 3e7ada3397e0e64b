"""One rank: steps that go wrong, and steps against a frozen reference. Started by test_learner_step.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers_zero import WEIGHTED, batch, config, full_weights, open_engine, share

from learner.nonfinite import NonFiniteError
from learner.step import train_step
from uniapl.config import Config
from uniapl.objective.controllers import Controllers

PLAIN_ADVANTAGE = WEIGHTED | {"preference": {"weight": 0.7, "advantage_std": False}}


def main(spec: dict[str, Any], out: Path, rank: int) -> None:
    found = {
        "loss": _failing(spec, rank, spec["model"], huge=1e40, diagnostics_every=0),
        "loss, with diagnostics": _failing(spec, rank, spec["model"], huge=1e40, diagnostics_every=1),
        "gradient": _failing(spec, rank, spec["steep"], huge=1e37, diagnostics_every=0),
        "weight": _failing(spec, rank, spec["poisoned"], huge=0.0, diagnostics_every=0),
        "refused": _refused(spec, rank),
        "kl": _against_reference(spec, rank),
    }
    torch.save(found, out / f"found-{rank}.pt")


def _step(engine: Any, c: Config, whole: Any, rank: int, reference: Any = None) -> dict[str, float]:
    weights, ranks = Controllers(c.objective).weights(whole.step), torch.distributed.get_world_size()
    return train_step(engine, share(whole, rank, ranks), c, weights, 1e-2, "cpu", reference)


def _failing(spec: dict[str, Any], rank: int, model: str, huge: float, diagnostics_every: int) -> dict[str, Any]:
    """A step on a batch with a huge reward, then one on a good batch, and that one on an engine without a past."""
    objective = PLAIN_ADVANTAGE | {"diagnostics_every": diagnostics_every}
    c = config(model, objective, row_tokens=spec["row_tokens"])
    engine, _ = open_engine(c, spec["ranks"])
    before = full_weights(engine)
    try:
        _step(engine, c, batch(huge=huge), rank)
        raise AssertionError("the step was made")
    except NonFiniteError as error:
        found: dict[str, Any] = {"what": error.what, "ids": error.ids, "found_in": error.found_in, "line": str(error)}
    found["unchanged"] = torch.equal(before.nan_to_num(), full_weights(engine).nan_to_num())
    if huge:
        fresh, _ = open_engine(c, spec["ranks"])
        keys = ("loss/total", "learner/grad_norm")
        steps = [_step(e, c, batch(), rank) for e in (engine, fresh)]
        found["afterwards"], found["without a past"] = ([step[key] for key in keys] for step in steps)
        found["same weights"] = torch.equal(full_weights(engine), full_weights(fresh))
    return found


def _refused(spec: dict[str, Any], rank: int) -> str:
    """What is told of a step that DeepSpeed did not make.

    It says so by itself in float16 alone, which no run has: that it would is put in its mouth here.
    """
    c = config(spec["model"], WEIGHTED, row_tokens=spec["row_tokens"])
    engine, _ = open_engine(c, spec["ranks"])
    engine.was_step_applied = lambda: False
    try:
        _step(engine, c, batch(), rank)
    except NonFiniteError as error:
        return str(error)
    return "the step was made"


def _against_reference(spec: dict[str, Any], rank: int) -> list[dict[str, float]]:
    """Three steps with a KL term to where the policy began."""
    objective = WEIGHTED | {"kl": {"weight": 0.5}, "diagnostics_every": 1}
    c = config(spec["model"], objective, row_tokens=spec["row_tokens"])
    engine, reference = open_engine(c, spec["ranks"])
    return [_step(engine, c, batch(step), rank, reference) for step in range(3)]
