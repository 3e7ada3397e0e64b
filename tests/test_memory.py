"""The learner's step never holds the logits of all tokens: it grows with the hidden size, not the vocabulary."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_tiny import tiny_model

from uniapl.records import Demonstration, Group, MixedBatch, Prompt, Sample, Score, VersionSpan

TESTS = Path(__file__).resolve().parent
TOKENS = 2048
VOCABULARY = 32_768
LENGTH = 128
"""Tokens of a response."""
WEIGHTS = {"demonstration": 0.5, "preference": 0.5, "adversarial": 0.1, "kl": 0.0}


def whole_step(vocabulary: int, folder: Path) -> dict[str, float]:
    """MiB that the learner's steps hold at most beyond what is there between them: with diagnostics, and without.

    What is there: weights, their float32 masters, the optimizer's state and the sums of gradients, of one ZeRO-3 rank.
    """
    from helpers_zero import config

    from learner.device import local_device
    from learner.step import train_step
    from learner.zero import build_engine, join_ranks
    from uniapl.policy import load_policy

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    device = local_device(0)
    join_ranks(device, 60)
    objective = {"diagnostics_every": 2, "adversarial": {"weight": 0.1, "discriminator": "embedding"}}
    c = config(str(tiny_model(folder, vocab=vocabulary)), objective, row_tokens=TOKENS)
    policy = load_policy(c.model.path)
    weights = sum(p.numel() for p in policy.parameters()) * 4 / 2**20
    engine = build_engine(policy, c.learner, 1, device)

    def step(number: int) -> dict[str, float]:
        return train_step(engine, work(number), c, WEIGHTS, 1e-4, "cpu")

    step(1)
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    diagnosed, plain = step(2), step(3)
    return {
        "transient": held("VmHWM") - before,
        "weights": weights,
        "tokens": plain["tokens/computed"],
        "entropy": diagnosed["entropy/exact"],
    }


def work(step: int) -> MixedBatch:
    """One row of `TOKENS` tokens: two groups of four, each with a prompt, and demonstrations."""
    ids = [(7 * i) % 300 for i in range(LENGTH)]
    samples = [
        Sample(ids, [-3.0] * LENGTH, [VersionSpan(0, LENGTH, 0)], "", "stop", Score(reward=i % 2, expert_score=0.1 * i))
        for i in range(4)
    ]
    groups = [Group(g, Prompt(f"p{g}", [], [1, 2]), samples, "a") for g in range(2)]
    return MixedBatch(step, groups, [Demonstration(f"d{i}", [1, 2], ids) for i in range(8)])


def held(what: str) -> float:
    """MiB, from the kernel."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what)]
    return int(line.split()[1]) / 1024


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    """Both vocabularies, each in a process of its own that begins with nothing allocated and keeps nothing freed."""
    found = {}
    for vocabulary in (VOCABULARY, 4 * VOCABULARY):
        done = subprocess.run(
            [sys.executable, __file__, str(vocabulary), str(tmp_path_factory.mktemp("model"))],
            env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "MALLOC_MMAP_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
            check=True,
        )
        found[vocabulary] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_vocabulary_four_times_as_large_takes_no_more_than_its_weights_and_gradients(
    measured: dict[int, dict[str, float]],
) -> None:
    small, large = measured[VOCABULARY], measured[4 * VOCABULARY]
    # Backward makes every gradient anew before it is added to the sum that is there.
    growth = large["weights"] - small["weights"]
    assert large["transient"] - growth <= 1.3 * small["transient"]


def test_the_logits_of_all_tokens_would_not_have_fitted(measured: dict[int, dict[str, float]]) -> None:
    for vocabulary, found in measured.items():
        assert found["tokens"] > TOKENS
        assert found["transient"] < TOKENS * vocabulary * 4 / 2**20


def test_the_steps_measured_the_exact_entropy_too(measured: dict[int, dict[str, float]]) -> None:
    for vocabulary, found in measured.items():
        assert 0.9 * math.log(vocabulary) < found["entropy"] <= math.log(vocabulary)


if __name__ == "__main__":
    print(json.dumps(whole_step(int(sys.argv[1]), Path(sys.argv[2]))))
