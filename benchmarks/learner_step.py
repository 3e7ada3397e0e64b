"""Seconds and memory of one learner step, by row length and arithmetic, on a batch like that of configs/local.yaml.

    python benchmarks/learner_step.py [--model FOLDER] [--steps 3] [--rows 384x1 384x6/alone] [--dtypes bfloat16]

`384x6`: rows of at most 384 tokens, 6 of them in one forward pass; `/alone`: no shared prompts.

One ZeRO-3 rank in a process of its own per setting, with the environment that the learner's actor has.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import socket
import subprocess
import sys
import time


def batch(seed: int) -> object:
    """8 groups of 4 samples of 16 to 64 tokens, and 16 demonstrations; prompts of 60 to 110 tokens."""
    from uniapl.records import Demonstration, Group, MixedBatch, Prompt, Sample, Score, VersionSpan

    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(100, 40_000) for _ in range(draw.randint(low, high))]

    groups = []
    for g in range(8):
        samples = []
        for i in range(4):
            tokens = ids(16, 64)
            score = Score(float(i % 2), expert_score=0.1 * i)
            samples.append(Sample(tokens, [-2.0] * len(tokens), [VersionSpan(0, len(tokens), 0)], "", "stop", score))
        groups.append(Group(g, Prompt(str(g), [], ids(60, 110)), samples, "a"))
    shown = [Demonstration(str(i), ids(60, 110), ids(16, 64)) for i in range(16)]
    return MixedBatch(0, groups, shown)


def measure(model: str, dtype: str, rows: str, steps: int) -> dict[str, float | str]:
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
    config = load_config("configs/local.yaml", overrides)
    device = local_device(0)
    set_threads(0, 1)
    join_ranks(device, 600)
    engine = build_engine(load_policy(model), config.learner, 1)
    times, tokens, efficiency = [], 0.0, 0.0
    for step in range(steps + 1):
        began = time.perf_counter()
        metrics = train_step(engine, batch(step), config, 1e-5, device.torch_device)  # type: ignore[arg-type]
        times.append(time.perf_counter() - began)
        tokens, efficiency = metrics["tokens/trained"], metrics["learner/packing_efficiency"]
    best = sorted(times[1:])[len(times[1:]) // 2]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "dtype": dtype,
        "rows": rows,
        "step_s": round(best, 2),
        "tokens_per_s": round(tokens / best),
        "packing": round(efficiency, 3),
        "peak_gib": round(peak, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", nargs="+", default=["384x1", "384x6", "384x6/alone", "1024x2", "2048x1"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print("RESULT " + json.dumps(measure(arguments.model, arguments.one[0], arguments.one[1], arguments.steps)))
        return
    from learner.device import cpu_environment

    for dtype in arguments.dtypes:
        for rows in arguments.rows:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, __file__, "--model", arguments.model, "--steps", str(arguments.steps)]
            done = subprocess.run(
                [*command, "--one", dtype, rows],
                env=cpu_environment() | os.environ | alone | {"PYTHONPATH": os.getcwd()},
                capture_output=True,
                text=True,
            )
            lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
            print(lines[0].removeprefix("RESULT ") if lines else done.stderr[-2000:], flush=True)


if __name__ == "__main__":
    main()
