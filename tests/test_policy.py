"""Token log-probabilities: exact, packed as alone, and without the whole [tokens, vocabulary] tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_tiny import tiny_model
from transformers import AutoModelForCausalLM

from uniapl.objective.logprobs import token_logprobs
from uniapl.objective.rows import make_rows
from uniapl.objective.sequences import TrainingSequence
from uniapl.policy import load_policy


def sequences() -> list[TrainingSequence]:
    shapes = [(4, 7), (2, 1), (9, 12), (3, 5)]
    return [
        TrainingSequence(str(i), list(range(5, 5 + p)), list(range(40 + i, 40 + i + r)), 0.5 + 0.5 * i)
        for i, (p, r) in enumerate(shapes)
    ]


def alone(model: torch.nn.Module, s: TrainingSequence) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([s.prompt_ids + s.response_ids])).logits[0, len(s.prompt_ids) - 1 : -1]
    chosen = torch.tensor(s.response_ids)[:, None]
    return (logits.double() / s.temperature).log_softmax(-1).gather(1, chosen)[:, 0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cuts", [[4], [1, 3], [2, 1, 1]], ids=["one row", "two rows", "three rows"])
def test_packed_and_padded_logprobs_equal_each_sequence_alone(tied: bool, cuts: list[int], tmp_path: Path) -> None:
    left = iter(sequences())
    rows = [[next(left) for _ in range(cut)] for cut in cuts]
    folder = tiny_model(tmp_path, seed=1, tied=tied)
    policy = load_policy(str(folder))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        packed = policy(make_rows(rows))
        expected = torch.cat([alone(plain, s) for s in sequences()])
    assert (packed - expected).abs().max() <= 1e-5


def test_activation_checkpointing_changes_no_gradient(tiny: Path) -> None:
    found = []
    for checkpointing in (False, True):
        policy = load_policy(str(tiny), activation_checkpointing=checkpointing)
        policy(make_rows([sequences()])).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert torch.allclose(found[0], found[1], rtol=1e-6, atol=1e-8)


def test_bfloat16_arithmetic_is_near_and_differentiable(tiny: Path) -> None:
    exact = load_policy(str(tiny))(make_rows([sequences()]))
    policy = load_policy(str(tiny)).bfloat16()
    near = policy(make_rows([sequences()]))
    near.sum().backward()
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 0.5
    assert all(p.grad is not None for p in policy.parameters())


def test_logprobs_agree_with_a_direct_softmax_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1000, 16, dtype=torch.float64, requires_grad=True)
    targets, temperature = torch.randint(0, 1000, (300,)), torch.rand(300, dtype=torch.float64) + 0.5
    upstream = torch.randn(300, dtype=torch.float64)
    direct = ((hidden @ weight.T) / temperature[:, None]).log_softmax(-1)[torch.arange(300), targets]
    expected = torch.autograd.grad(direct @ upstream, (hidden, weight))
    found = token_logprobs(hidden, weight, targets, temperature)
    gradients = torch.autograd.grad(found @ upstream, (hidden, weight))
    assert torch.allclose(found, direct, atol=1e-10)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


def test_an_output_layer_with_a_bias_is_refused() -> None:
    from uniapl.objective.logprobs import TokenLogprobHead

    with pytest.raises(ValueError, match="bias"):
        TokenLogprobHead(torch.nn.Linear(4, 8, bias=True))
