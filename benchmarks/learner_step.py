"""Seconds and memory of one learner step, by row length and arithmetic, on the work W (benchmarks/work.py).

    python benchmarks/learner_step.py [--model FOLDER] [--steps 3] [--rows 384x1 384x6/alone] [--dtypes bfloat16]

`384x6`: rows of at most 384 tokens, 6 of them in one forward pass; `/alone`: no shared prompts.

One ZeRO-3 rank in a process of its own per setting, with the environment that the learner's actor has.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from work import batch, in_own_process, report, timed

WEIGHTS = {"demonstration": 0.5, "preference": 0.5, "adversarial": 0.1, "kl": 0.0}


def measure(model: str, dtype: str, rows: str, steps: int) -> dict[str, Any]:
    """One setting, in this process."""
    from learner.device import local_device, set_threads
    from learner.step import train_step
    from learner.zero import build_engine, join_ranks
    from uniapl.config import load_config
    from uniapl.policy import load_policy

    shape, _, alone = rows.partition("/")
    row_tokens, micro = shape.split("x")
    overrides = [f"model.path={model}", f"learner.dtype={dtype}", f"learner.row_tokens={row_tokens}"]
    overrides += [f"learner.micro_batch_rows={micro}", f"learner.share_prompts={'false' if alone else 'true'}"]
    config = load_config("configs/local.yaml", [*overrides, "objective.diagnostics_every=0"])
    device = local_device(0)
    set_threads(0, 1)
    join_ranks(device, 600)
    engine = build_engine(load_policy(model, attention=device.attention), config.learner, 1, device)
    seen: dict[str, float] = {}

    def step(i: int) -> None:
        seen.update(train_step(engine, batch(i), config, WEIGHTS, 1e-5, device.torch_device))

    found = timed(step, steps, device.torch_device)
    return {
        "dtype": dtype,
        "rows": rows,
        **found,
        "tokens_per_s": round(seen["tokens/trained"] / found["step_s"]),
        "packing": round(seen["learner/packing_efficiency"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", nargs="+", default=["384x1", "384x6", "384x6/alone", "1024x2", "2048x1"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        report(measure(a.model, a.one[0], a.one[1], a.steps))
        return
    for dtype in a.dtypes:
        for rows in a.rows:
            print(
                json.dumps(in_own_process(["--model", a.model, "--steps", str(a.steps), "--one", dtype, rows])),
                flush=True,
            )


if __name__ == "__main__":
    main()
