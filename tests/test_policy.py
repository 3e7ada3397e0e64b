"""Token log-probabilities: exact, packed as alone, and without the whole [tokens, vocabulary] tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_tiny import tiny_model
from transformers import AutoModelForCausalLM

from uniapl.objective.entropy import token_entropy
from uniapl.objective.logprobs import token_logprobs
from uniapl.objective.rows import block_tokens, make_rows, share_prompts
from uniapl.objective.sequences import TrainingSequence
from uniapl.policy import TokenLogprobHead, load_policy


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
    rows = [[[next(left)] for _ in range(cut)] for cut in cuts]
    folder = tiny_model(tmp_path, seed=1, tied=tied)
    policy = load_policy(str(folder))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        packed = policy(make_rows(rows))
        expected = torch.cat([alone(plain, s) for s in sequences()])
    assert (packed - expected).abs().max() <= 1e-5


def group_and_more() -> list[TrainingSequence]:
    """Four samples of one prompt, two of another, one alone; each with temperature and signals of its own."""
    found = []
    for g, (prompt, lengths) in enumerate([(6, [3, 1, 7, 4]), (3, [2, 5]), (8, [6])]):
        for i, n in enumerate(lengths):
            ids = list(range(60 + 20 * g + i, 60 + 20 * g + i + n))
            found.append(TrainingSequence(f"{g}/{i}", list(range(5 + g, 5 + g + prompt)), ids, 0.7 + 0.1 * i))
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("row_tokens", [64, 14])
def test_a_shared_prompt_changes_neither_logprobs_nor_gradients(
    tiny: Path, row_tokens: int, checkpointing: bool
) -> None:
    found = []
    for share in (False, True):
        policy = load_policy(str(tiny), activation_checkpointing=checkpointing)
        blocks = share_prompts(group_and_more(), row_tokens, share)
        rows = make_rows([blocks[:2], blocks[2:]])
        logprobs = policy(rows)
        (logprobs * torch.arange(1, len(logprobs) + 1)).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in policy.parameters()])
        found.append((rows.input_ids.numel(), logprobs.detach(), gradients))
    (_, plain, plain_gradients), (_, shared, shared_gradients) = found
    assert (shared - plain).abs().max() <= 1e-5
    assert (shared_gradients - plain_gradients).norm() <= 1e-5 * plain_gradients.norm()


def test_the_expert_response_of_a_groups_prompt_shares_it_too(tiny: Path) -> None:
    expert = TrainingSequence("expert", list(range(5, 11)), [90, 91, 92], 1.0)  # after all samples, as in a batch
    blocks = share_prompts([*group_and_more(), expert], 64, True)
    assert [s.id for s in blocks[0]] == ["0/0", "0/1", "0/2", "0/3", "expert"]
    policy = load_policy(str(tiny))
    with torch.no_grad():
        shared, plain = policy(make_rows([blocks[:1]])), policy(make_rows([[[expert]]]))
    assert (shared[-3:] - plain).abs().max() <= 1e-5


def test_blocks_hold_one_prompt_within_the_row() -> None:
    sequences = group_and_more()
    assert [len(b) for b in share_prompts(sequences, 64, True)] == [4, 2, 1]
    assert [len(b) for b in share_prompts(sequences, 14, True)] == [2, 1, 1, 2, 1]
    assert [len(b) for b in share_prompts(sequences, 64, False)] == [1] * 7
    assert [s for block in share_prompts(sequences, 14, True) for s in block] == sequences
    assert all(block_tokens(b) <= 14 for b in share_prompts(sequences, 14, True))


def test_activation_checkpointing_changes_no_gradient(tiny: Path) -> None:
    found = []
    for checkpointing in (False, True):
        policy = load_policy(str(tiny), activation_checkpointing=checkpointing)
        policy(make_rows([[[s] for s in sequences()]])).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert torch.allclose(found[0], found[1], rtol=1e-6, atol=1e-8)


def test_bfloat16_arithmetic_is_near_and_differentiable(tiny: Path) -> None:
    exact = load_policy(str(tiny))(make_rows([[[s] for s in sequences()]]))
    policy = load_policy(str(tiny)).bfloat16()
    near = policy(make_rows([[[s] for s in sequences()]]))
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


def test_exact_entropy_of_every_target_at_its_temperature(tiny: Path) -> None:
    policy = load_policy(str(tiny))
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    rows = make_rows([[[s] for s in sequences()]])
    logprobs, entropy = policy(rows, entropy=True)
    expected = []
    for s in sequences():
        logits = plain(input_ids=torch.tensor([s.prompt_ids + s.response_ids])).logits[0, len(s.prompt_ids) - 1 : -1]
        expected.append(torch.distributions.Categorical(logits=logits.double() / s.temperature).entropy())
    assert (entropy - torch.cat(expected)).abs().max() <= 1e-5
    assert not entropy.requires_grad
    assert torch.equal(logprobs, policy(rows)), "asking for the entropy changes no log-probability"


def test_entropy_over_many_chunks_agrees_with_the_formula() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(600, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    temperature = torch.rand(600, dtype=torch.float64) + 0.5
    p = ((hidden @ weight.T) / temperature[:, None]).softmax(-1)
    assert torch.allclose(token_entropy(hidden, weight, temperature), -(p * p.log()).sum(-1), atol=1e-12)
    assert token_entropy(hidden[:0], weight, temperature[:0]).shape == (0,)


def test_an_output_layer_with_a_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        TokenLogprobHead(torch.nn.Linear(4, 8, bias=True))
