"""The ZeRO-3 learner against plain PyTorch: same gradients for any ranks, micro-batches and packing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import helpers_zero
import pytest
import torch
from transformers import AutoModelForCausalLM

from uniapl.config import Config
from uniapl.objective.sequences import TrainingSequence, training_sequences

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(model: Path, out: Path, ranks: int, row_tokens: int) -> Path:
    """Run `helpers_zero` on `ranks` processes of this machine."""
    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, helpers_zero.__file__, str(model), str(out), str(ranks), str(rank), str(row_tokens)],
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    logs = [p.communicate(timeout=240)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * ranks, logs[0][-3000:]
    return out


def plain_logprobs(model: torch.nn.Module, s: TrainingSequence) -> torch.Tensor:
    """Of one sequence alone: no packing, no padding, full logits, float64 softmax."""
    ids = torch.tensor([s.prompt_ids + s.response_ids])
    logits = model(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1].double() / s.temperature
    return logits.log_softmax(-1)[torch.arange(len(s.response_ids)), torch.tensor(s.response_ids)]


def plain_loss(model: torch.nn.Module, config: Config) -> torch.Tensor:
    """METHOD in its slow form: every term a sum over tokens, divided by its own count."""
    o = config.objective
    totals, counts = [0.0, 0.0, 0.0], [0, 0, 0]
    for s in training_sequences(helpers_zero.batch(), o, config.rollout.temperature):
        logp = plain_logprobs(model, s)
        n = len(s.response_ids)
        if s.demonstration:
            totals[0], counts[0] = totals[0] - logp.sum(), counts[0] + n
            continue
        kappa = torch.exp(logp.detach() - torch.tensor(s.behaviour_logprobs)).clamp(max=o.preference.correction_cap)
        ratio = torch.exp(logp - logp.detach())
        for i, advantage in ((1, s.preference_advantage), (2, s.adversarial_advantage)):
            if advantage is not None:
                clipped = ratio.clamp(0.8, 1.2)
                totals[i] = totals[i] - (kappa * torch.minimum(ratio * advantage, clipped * advantage)).sum()
                counts[i] += n
    weights = (o.demonstration.weight, o.preference.weight, o.adversarial.weight)
    return sum(w * t / c for w, t, c in zip(weights, totals, counts, strict=True))


def plain_gradients(model_path: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    plain_loss(model, helpers_zero.config(str(model_path), 1, 64)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("zero")
    return {
        "1 rank, long rows": run_ranks(tiny, base / "a", 1, 4096),
        "2 ranks, short rows": run_ranks(tiny, base / "b", 2, 32),
    }


@pytest.mark.parametrize("name", ["1 rank, long rows", "2 ranks, short rows"])
def test_gradients_equal_plain_pytorch(runs: dict[str, Path], tiny: Path, name: str) -> None:
    expected = plain_gradients(tiny)
    found = torch.load(runs[name] / "gradients.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        difference = (found[key] - gradient).norm() / gradient.norm()
        assert difference <= 1e-5, f"{key}: relative difference {difference:.1e}"


def test_a_loaded_checkpoint_continues_to_the_bit(runs: dict[str, Path]) -> None:
    for folder in runs.values():
        undisturbed, resumed = json.loads((folder / "steps.json").read_text())
        keys = ("loss/total", "learner/grad_norm", "expert/nll", "kl/behaviour")
        assert [undisturbed[k] for k in keys] == [resumed[k] for k in keys]


def test_metrics_do_not_depend_on_ranks_and_packing(runs: dict[str, Path]) -> None:
    one, two = (json.loads((folder / "steps.json").read_text())[0] for folder in runs.values())
    assert one.keys() == two.keys()
    of_packing = {"tokens/trained_per_s", "tokens/computed", "learner/packing_efficiency"}
    for key in one.keys() - of_packing:
        assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-7), key


def test_the_exported_folder_is_a_model_with_a_tokenizer(runs: dict[str, Path], tiny: Path) -> None:
    from transformers import AutoTokenizer

    folder = runs["2 ranks, short rows"] / "model"
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    start = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).state_dict()
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[k], start[k]) for k in start)
    assert AutoTokenizer.from_pretrained(folder).chat_template
