"""The packed objective against a slow one: values and gradients, for every option; splits; finite differences."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle_batches import (
    LONGEST,
    loss_of,
    make_objective,
    random_batch,
    random_logprobs,
    sequences_of,
    weights_of,
    whole_loss,
)
from oracle_objective import Known, oracle_terms
from torch import Tensor

from uniapl.config import ObjectiveConfig
from uniapl.objective.logprobs import token_logprobs
from uniapl.objective.objective import REDUCED, rows_loss
from uniapl.objective.rows import Rows, count_terms, make_rows
from uniapl.policy import Policy, load_policy
from uniapl.records import MixedBatch

RTOL = 2e-6
"""The signals of packed rows (advantages, behaviour, weights) are float32."""

SURROGATES = [
    {"ratio": ratio, "proximal": proximal, "correction": correction, "cap": 1.5, "floor": 0.7}
    for ratio, proximal, correction in itertools.product(
        ["token", "sequence"], ["step_start", "behaviour"], ["truncate", "mask", "sequence", "off"]
    )
]
OPTIONS: list[dict[str, dict[str, Any]]] = [
    *({"surrogate": options} for options in SURROGATES),
    *(
        {"preference": {"average": a}, "adversarial": {"average": b}}
        for a, b in [("sequence", "token"), ("constant", "sequence"), ("token", "constant")]
    ),
    {"preference": {"advantage_std": False}},
    {"adversarial": {"advantage_std": False}},
    {"adversarial": {"as_reward": True}},
    {"demonstration": {"token_weight": "p_one_minus_p"}},
    {"surrogate": {"ratio": "sequence"}, "preference": {"average": "sequence"}, "adversarial": {"average": "sequence"}},
]


def expected(
    batch: MixedBatch, objective: ObjectiveConfig, known: dict[str, Known]
) -> tuple[Tensor, dict[str, Tensor]]:
    weights = weights_of(objective)
    terms = oracle_terms(batch, objective, known, weights["adversarial"], LONGEST)
    return sum((weights[term] * value for term, value in terms.items()), torch.zeros(())), terms


def gradients(loss: Tensor, known: dict[str, Known]) -> Tensor:
    found = torch.autograd.grad(loss, [k.current for k in known.values()], allow_unused=True, materialize_grads=True)
    return torch.cat(found)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_terms_loss_and_gradient_equal_the_slow_ones(options: dict[str, Any], seed: int) -> None:
    objective, batch = make_objective(**options), random_batch(seed)
    known = random_logprobs(batch, seed)
    slow, terms = expected(batch, objective, known)
    packed = whole_loss(batch, objective, known)
    assert {f"loss/{term}": value.item() for term, value in terms.items()} == pytest.approx(
        {f"loss/{term}": packed.sums[f"loss/{term}"] for term in terms}, rel=RTOL, abs=1e-7
    )
    assert packed.loss.item() == pytest.approx(slow.item(), rel=RTOL, abs=1e-7)
    found, wanted = gradients(packed.loss, known), gradients(slow, known)
    assert (found - wanted).norm() <= RTOL * wanted.norm()


def test_the_options_change_the_loss_so_that_agreement_says_something() -> None:
    batch = random_batch(0)
    known = random_logprobs(batch, 0)
    losses = {str(o): round(expected(batch, make_objective(**o), known)[0].item(), 9) for o in OPTIONS}
    # With pi_proximal = pi_behaviour nothing is left to correct: the four corrections agree, for either ratio.
    assert len(set(losses.values())) == len(OPTIONS) - 2 * 3


@given(st.integers(0, 1000), st.sampled_from(OPTIONS), st.data())
def test_any_split_into_rows_adds_up_to_the_whole(seed: int, options: dict[str, Any], data: st.DataObject) -> None:
    objective, batch = make_objective(**options), random_batch(seed, groups=2, size=3, demonstrations=2)
    known = random_logprobs(batch, seed)
    sequences = sequences_of(batch, objective)
    counts = count_terms(sequences)
    homes = data.draw(st.lists(st.integers(0, 3), min_size=len(sequences), max_size=len(sequences)))
    split = [[s for s, home in zip(sequences, homes, strict=True) if home == part] for part in range(4)]
    parts = [loss_of(part, counts, objective, known) for part in split]
    assert sum(count_terms(part) for part in split).tolist() == pytest.approx(counts.tolist())
    whole = loss_of(sequences, counts, objective, known)
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-9, abs=1e-12)
    for key in REDUCED:
        assert sum(part.sums[key] for part in parts) == pytest.approx(whole.sums[key], rel=1e-6, abs=1e-7), key
    found, wanted = gradients(sum(part.loss for part in parts), known), gradients(whole.loss, known)
    assert (found - wanted).norm() <= 1e-9 * wanted.norm() + 1e-12


class TestFiniteDifferences:
    """The derivative of the whole loss along random directions of a real model's weights, in float64."""

    STEP = 1e-5

    @pytest.fixture(scope="class")
    def policy(self, tiny: Path) -> Policy:
        policy = load_policy(str(tiny)).double()
        for name, module in list(policy.named_modules()):
            if type(module).__name__ == "Qwen3RMSNorm":  # it computes in float32, whatever it is given
                exact = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
                exact.weight = module.weight
                policy.set_submodule(name, exact)
        return policy

    def logprobs(self, policy: Policy, rows: Rows) -> Tensor:
        hidden = policy.model.base_model(
            input_ids=rows.input_ids, position_ids=rows.position_ids, attention_mask=None, use_cache=False
        ).last_hidden_state
        head = policy.model.get_output_embeddings()
        return token_logprobs(hidden.flatten(0, 1)[rows.index], head.weight, rows.targets, rows.temperature.double())

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"surrogate": {"ratio": "sequence", "correction": "sequence"}, "preference": {"average": "sequence"}},
            {"surrogate": {"proximal": "behaviour"}, "demonstration": {"token_weight": "p_one_minus_p"}},
        ],
        ids=str,
    )
    def test_the_gradient_is_the_slope(self, policy: Policy, options: dict[str, Any]) -> None:
        objective = make_objective(**options)
        batch = random_batch(5, groups=3, size=3, demonstrations=2)
        start = self.engine_near_policy(policy, batch, objective)
        sequences = sequences_of(batch, objective)
        rows, counts = make_rows([[[s] for s in sequences]]), count_terms(sequences)
        reference = start + 0.3 * torch.randn(len(start), generator=torch.Generator().manual_seed(1))

        def loss() -> Tensor:
            return rows_loss(
                self.logprobs(policy, rows), rows, counts, weights_of(objective), objective, reference, start
            ).loss

        parameters = list(policy.parameters())
        gradient = torch.autograd.grad(loss(), parameters)
        generator = torch.Generator().manual_seed(2)
        for _ in range(4):
            direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
            found = sum((g * d).sum().item() for g, d in zip(gradient, direction, strict=True))
            assert found == pytest.approx(self.slope(loss, parameters, direction), rel=1e-5, abs=1e-8)

    def engine_near_policy(self, policy: Policy, batch: MixedBatch, objective: ObjectiveConfig) -> Tensor:
        """Give every sample behaviour log-probabilities near the policy's own; returns the policy's."""
        sequences = sequences_of(batch, objective)
        with torch.no_grad():
            start = self.logprobs(policy, make_rows([[[s] for s in sequences]]))
        parts = start.split([len(s.response_ids) for s in sequences])
        left = {s.id: part for s, part in zip(sequences, parts, strict=True)}
        generator = torch.Generator().manual_seed(3)
        for group in batch.groups:
            for i, sample in enumerate(group.samples):
                if sample.token_ids:
                    own = left[f"{group.prompt.id}/{i}"]
                    sample.logprobs = (own + 0.3 * torch.randn(len(own), generator=generator)).tolist()
        return start

    def slope(self, loss: Any, parameters: list[Tensor], direction: list[Tensor]) -> float:
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):  # one step ahead, two back, and home
                for p, d in zip(parameters, direction, strict=True):
                    p += sign * self.STEP * d
                values.append(loss().item())
        return (values[0] - values[1]) / (2 * self.STEP)
