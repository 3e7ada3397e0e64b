"""One rank: the gradients of many configurations, a checkpoint, an export. Started by test_zero.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers_zero import batch, config, full_gradients, full_weights, open_engine, share

from learner import checkpoint
from learner.diagnostics import run_term_by_term
from learner.gradients import gradient_norm
from learner.passes import Passes, Tally, plan_micro_batches
from learner.step import all_sum, train_step
from uniapl.config import Config
from uniapl.objective.controllers import Controllers
from uniapl.objective.rows import count_terms
from uniapl.objective.sequences import training_sequences
from uniapl.policy import PREFIX
from uniapl.schedule import learning_rate


def main(spec: dict[str, Any], out: Path, rank: int) -> None:
    """Of every case the gradients, in one pass and term by term, and the metrics of a step; a checkpoint."""
    ranks = spec["ranks"]
    found = {}
    for name, case in spec["cases"].items():
        c = config(spec["model"], case["objective"], row_tokens=case["row_tokens"], **case.get("learner", {}))
        found[name] = _case(c, rank, ranks)
    if "clipped" in spec:
        c = config(spec["model"], row_tokens=spec["checkpoint"], **spec["clipped"])
        found["clipped"] = _clipped(c, rank, ranks)
    if "checkpoint" in spec:
        c = config(spec["model"], row_tokens=spec["checkpoint"])
        found["checkpoint"] = _checkpoint(c, out, rank, ranks)
    if rank == 0:
        torch.save(found, out / "found.pt")


def _case(c: Config, rank: int, ranks: int) -> dict[str, Any]:
    weights, mine = Controllers(c.objective).weights(0), share(batch(), rank, ranks)
    sequences = training_sequences(mine, c.objective, c.rollout.temperature, weights, c.rollout.max_tokens)
    counts = all_sum(count_terms(sequences), "cpu")
    found: dict[str, Any] = {}
    for kind in ("once", "by term"):
        engine, reference = open_engine(c, ranks)
        passes = Passes(engine, reference, c.objective, counts, weights, "cpu")
        if kind == "once":
            passes.run(plan_micro_batches(sequences, c.learner, "cpu"), Tally())
        else:
            found["diagnostics"] = run_term_by_term(passes, sequences, c.learner, Tally())
        found[kind] = full_gradients(engine)
        found[f"norm {kind}"] = gradient_norm(engine)
        sums = engine.optimizer.averaged_gradients.values()
        found[f"joined in place {kind}"] = [
            engine.optimizer.flatten(part).data_ptr() == part[0].data_ptr() for part in sums
        ]
        engine.step()
        found[f"DeepSpeed's norm {kind}"] = float(engine.get_global_grad_norm())
        found[f"weights {kind}"] = full_weights(engine)
    engine, reference = open_engine(c, ranks)
    found["steps"] = _spied(engine) if c.learner.steps_per_batch > 1 else []
    found["metrics"] = train_step(engine, mine, c, weights, 1e-2, "cpu", reference)
    return found


def _clipped(c: Config, rank: int, ranks: int) -> dict[str, Any]:
    """The weights after one step at the rate of the warm-up's first one, which is not what AdamW was built with."""
    engine, _ = open_engine(c, ranks)
    weights, rate = Controllers(c.objective).weights(0), learning_rate(0, c.run.steps, c.learner)
    metrics = train_step(engine, share(batch(), rank, ranks), c, weights, rate, "cpu")
    return {"metrics": metrics, "weights": full_weights(engine)}


def _spied(engine: Any) -> list[dict[str, Any]]:
    """Takes up the weights and the gradient with which every optimizer step is made: the step forgets them."""
    from deepspeed.utils import safe_get_full_fp32_param

    seen, step = [], engine.step

    def spy() -> None:
        named = engine.module.named_parameters()
        weights = {name.removeprefix(PREFIX): safe_get_full_fp32_param(p).clone() for name, p in named}
        seen.append({"weights": weights, "gradient": full_gradients(engine)})
        step()

    engine.step = spy
    return seen


def _checkpoint(c: Config, out: Path, rank: int, ranks: int) -> list[dict[str, float]]:
    """A second step of the engine that made the first one, and of one that was loaded from its checkpoint."""
    weights, mine = Controllers(c.objective).weights(0), share(batch(), rank, ranks)
    engine, _ = open_engine(c, ranks)
    train_step(engine, mine, c, weights, 1e-3, "cpu")
    checkpoint.save_engine(engine, out)
    again, _ = open_engine(c, ranks)
    checkpoint.load_engine(again, out)
    steps = [train_step(e, mine, c, weights, 1e-3, "cpu") for e in (engine, again)]
    checkpoint.export_model(again, c.model.path, out / "model", rank, card="")
    (out / "steps.json").write_text(json.dumps(steps))
    return steps
