"""Seconds of a step in synchronous and in asynchronous mode, against generating alone and training alone.

    python benchmarks/overlap.py [--layers 6] [--steps 12] [--staleness 2] [--set KEY=VALUE ...]

Two runs of `uniapl train` on configs/local.yaml with rollouts alone and the first layers of its model, which answers
with noise of the greatest length: the same work in every step. The engine and its actor are pinned to one core, the
learner to another. In the synchronous run one of the two works while the other waits: that gives the two bounds. The
last line is what the asynchronous mode takes in units of the larger of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

WARM_UP = 2
"""Steps that do not count: engine and learner meet their shapes for the first time."""
CORES = {"EngineCore": 0, "RolloutActor": 0, "LearnerRank": 1}


def first_layers(source: Path, folder: Path, layers: int) -> None:
    """Write the model of `source` without its later layers, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=layers, dtype=torch.float32)
    model.save_pretrained(folder)


def pin(leader: int) -> None:
    """Put every thread of the engine on one core and every thread of the learner on another."""
    cores = sorted(os.sched_getaffinity(0))
    for process in psutil.Process(leader).children(recursive=True):
        title = " ".join(process.cmdline())
        for word, core in CORES.items():
            if word in title:
                for thread in process.threads():
                    os.sched_setaffinity(thread.id, {cores[core]})


def run(name: str, folder: Path, staleness: int, a: argparse.Namespace) -> list[dict[str, Any]]:
    """One training run; the metrics of its steps.

    Raises:
        RuntimeError: it failed; holds the end of what it printed.
    """
    overrides = [
        f"run.name={name}",
        f"run.folder={folder}",
        f"run.steps={a.steps + WARM_UP}",
        "run.checkpoint_every=0",
        f"model.path={folder / 'model'}",
        "rollout.threads=1",
        "learner.threads=1",
        "learner.learning_rate=1e-9",
        "evaluation.prompts=0",
        "objective.diagnostics_every=0",
        "objective.preference.weight=1",
        "objective.demonstration.weight=0",
        "objective.adversarial={weight: 0, discriminator: none}",
        f"queue.max_staleness={staleness}",
        *a.set,
    ]
    command = [sys.executable, "-m", "cluster.cli", "train", "configs/local.yaml", *overrides]
    paths = {"PYTHONPATH": f"{os.getcwd()}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        command, env=os.environ | paths, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.rstrip().endswith("training ..."):
            pin(process.pid)
    if process.wait() != 0:
        raise RuntimeError("".join(lines)[-3000:])
    with (folder / name / "metrics.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def mean(metrics: list[dict[str, Any]], *keys: str) -> float:
    """Seconds per step, of the steps that count."""
    return statistics.fmean(sum(m[f"time/{key}"] for key in keys) for m in metrics[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--staleness", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the configuration")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        first_layers(a.model, folder / "model", a.layers)
        sync = run("sync", folder, 0, a)
        ahead = run("async", folder, a.staleness, a)
    generate, train = mean(sync, "generate", "score", "wait"), mean(sync, "train")
    found = {
        "generating alone": generate,
        "training alone": train,
        "synchronous": mean(sync, "step"),
        f"asynchronous, max_staleness {a.staleness}": mean(ahead, "step"),
    }
    tokens = {name: round(statistics.fmean(m["tokens/generated"] for m in ms[WARM_UP:]))
              for name, ms in (("sync", sync), ("async", ahead))}  # fmt: skip
    ratio = mean(ahead, "step") / max(generate, train)
    print(json.dumps({"seconds": found, "tokens_per_step": tokens, "async_over_larger_bound": round(ratio, 3)}))
    print("| a step | seconds |\n|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.2f} |")
    print(f"asynchronous / max(generating, training) = {ratio:.3f}")


if __name__ == "__main__":
    main()
