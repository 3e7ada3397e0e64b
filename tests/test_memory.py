"""The loss never holds the logits of all tokens: its memory grows with the hidden size, not with the vocabulary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_tiny import tiny_model

TESTS = Path(__file__).resolve().parent
TOKENS = 4096
VOCABULARY = 32_768
WEIGHTS = {"demonstration": 0.5, "preference": 0.5, "adversarial": 0.1, "kl": 0.0}


def whole_step(vocabulary: int, folder: Path) -> dict[str, float]:
    """MiB that forward, loss and backward of packed rows hold at most, beyond weights and gradients."""
    from uniapl.objective.objective import rows_loss
    from uniapl.objective.rows import count_terms, make_rows
    from uniapl.objective.sequences import TermShare, TrainingSequence
    from uniapl.objective_config import ObjectiveConfig
    from uniapl.policy import load_policy

    policy = load_policy(str(tiny_model(folder, vocab=vocabulary)))
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    length = 256
    ids = [(7 * i) % 300 for i in range(length)]
    terms = {name: TermShare(1.0, length, 0.5) for name in ("preference", "adversarial")}
    sampled = TrainingSequence("s", [1, 2], ids, 1.0, [-3.0] * length, terms)
    shown = TrainingSequence("d", [1, 2], ids, 1.0, None, {"demonstration": TermShare(1.0, length)})
    sequences = [sampled, shown] * (TOKENS // length // 2)
    rows, counts = make_rows([[[s]] for s in sequences]), count_terms(sequences)
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    logprobs, entropies = policy(rows, True)  # with the exact entropy, as in a step with diagnostics
    assert entropies.isfinite().all()
    rows_loss(logprobs, rows, counts, WEIGHTS, ObjectiveConfig()).loss.backward()
    weights = sum(p.numel() for p in policy.parameters()) * 4 / 2**20
    return {"transient": held("VmHWM") - before, "weights": weights}


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
    # Backward makes every gradient anew before it is added to the one that is there.
    growth = large["weights"] - small["weights"]
    assert large["transient"] - growth <= 1.3 * small["transient"]


def test_the_logits_of_all_tokens_would_not_have_fitted(measured: dict[int, dict[str, float]]) -> None:
    for vocabulary, found in measured.items():
        assert found["transient"] < TOKENS * vocabulary * 4 / 2**20


if __name__ == "__main__":
    print(json.dumps(whole_step(int(sys.argv[1]), Path(sys.argv[2]))))
