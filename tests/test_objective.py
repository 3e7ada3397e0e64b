"""The objective's terms against direct formulas, and its degenerate cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle_batches import LONGEST, random_batch
from torch import Tensor

from uniapl.config import ObjectiveConfig
from uniapl.objective.advantages import group_advantages
from uniapl.objective.objective import REDUCED, RowsLoss, rows_loss
from uniapl.objective.rows import count_terms, make_rows
from uniapl.objective.sequences import TermShare, TrainingSequence, training_sequences
from uniapl.objective.terms import demonstration_loss, k3, policy_ratio, rollout_correction, surrogate_loss
from uniapl.objective_config import TERMS, SurrogateConfig

ONE = torch.ones(1)


def sampled(length: int = 3, behaviour: float = -1.0, **advantages: float) -> TrainingSequence:
    """A sample that counts by token in the terms with an advantage."""
    terms = {term: TermShare(1.0, length, advantage) for term, advantage in advantages.items()}
    return TrainingSequence("s", [1, 2], list(range(3, 3 + length)), 1.0, [behaviour] * length, terms)


def demonstrated(length: int = 2) -> TrainingSequence:
    terms = {"demonstration": TermShare(1.0, length)}
    return TrainingSequence("d", [1, 2, 3], list(range(4, 4 + length)), 1.0, terms=terms)


def weights(**given: float) -> dict[str, float]:
    return dict.fromkeys(TERMS, 0.0) | given


def run(
    sequences: list[TrainingSequence], given: dict[str, float], logprobs: Tensor | None = None, **surrogate: Any
) -> tuple[RowsLoss, Tensor]:
    """The loss of the sequences in one row and its gradient, by default at random log-probabilities."""
    row = make_rows([[[s] for s in sequences]])
    if logprobs is None:
        logprobs = -torch.rand(len(row.targets), generator=torch.Generator().manual_seed(0))
    leaf = logprobs.clone().requires_grad_()
    objective = ObjectiveConfig(surrogate=SurrogateConfig(**surrogate))
    found = rows_loss(leaf, row, count_terms(sequences), given, objective, reference=torch.zeros_like(logprobs) - 1)
    found.loss.backward()
    assert leaf.grad is not None
    return found, leaf.grad


class TestAdvantages:
    def test_centred_and_divided_by_the_population_std(self) -> None:
        assert group_advantages([0.0, 1.0], True) == pytest.approx([-1.0, 1.0], abs=1e-5)
        assert group_advantages([1.0, 2.0, 6.0], False) == [-2.0, -1.0, 3.0]

    @pytest.mark.parametrize("values", [[0.3, 0.3, 0.3], [1.0], []])
    def test_equal_values_or_a_single_sample_give_exactly_zero(self, values: list[float]) -> None:
        assert group_advantages(values, True) == [0.0] * len(values)

    def test_huge_values_overflow_nowhere_on_the_way(self) -> None:
        assert group_advantages([1e308, 1e308, -1e308], True) == pytest.approx([0.5**0.5, 0.5**0.5, -(2.0**0.5)])
        assert group_advantages([1e200, 0.0], True) == [1.0, -1.0]
        assert group_advantages([1e200, 0.0], False) == [5e199, -5e199]
        assert group_advantages([1.7e308, -1.7e308, -1.7e308], False)[0] == math.inf

    @given(st.lists(st.floats(-100, 100).filter(lambda v: v == 0 or abs(v) > 1e-3), min_size=2), st.booleans())
    def test_they_are_those_of_the_plain_formula_to_the_bit(self, values: list[float], divide: bool) -> None:
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        plain = [(v - mean) / (std + 1e-6) if divide else v - mean for v in values]
        assert group_advantages(values, divide) == (plain if len(set(values)) > 1 else [0.0] * len(values))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_values_that_are_not_finite_are_refused(self, bad: float) -> None:
        with pytest.raises(ValueError, match="finite"):
            group_advantages([0.0, bad], True)


class TestSurrogate:
    def parts(self, ratio: float, advantage: float, kappa: float = 1.0) -> tuple[float, float]:
        """Loss and its gradient in log pi for one token with these ratios."""
        logp = torch.tensor([-1.0 + math.log(ratio)], requires_grad=True)
        rho = policy_ratio(logp, -ONE, ONE > 0, torch.zeros(1, dtype=torch.long), "token")
        found = surrogate_loss(rho, kappa * ONE, advantage * ONE, ONE, 0.2, 0.3)
        found.loss.sum().backward()
        assert logp.grad is not None
        assert bool(found.clipped.item()) == (logp.grad.item() == 0.0)
        return found.loss.item(), logp.grad.item()

    def test_inside_the_clip_it_is_minus_ratio_times_advantage(self) -> None:
        assert self.parts(1.1, 2.0) == pytest.approx((-2.2, -2.2), rel=1e-6)

    def test_a_good_token_beyond_the_upper_clip_has_no_gradient(self) -> None:
        assert self.parts(1.5, 2.0) == pytest.approx((-2.6, 0.0), rel=1e-6)

    def test_a_bad_token_below_the_lower_clip_has_no_gradient(self) -> None:
        assert self.parts(0.5, -2.0) == pytest.approx((1.6, 0.0), rel=1e-6)

    def test_a_bad_token_beyond_the_upper_clip_is_pushed_back(self) -> None:
        assert self.parts(1.5, -2.0) == pytest.approx((3.0, 3.0), rel=1e-6)

    def test_the_rollout_correction_multiplies(self) -> None:
        assert self.parts(1.1, 2.0, kappa=1.5) == pytest.approx((-3.3, -3.3), rel=1e-6)

    def test_the_ratio_of_a_sequence_is_the_geometric_mean_and_every_token_moves_it(self) -> None:
        logp = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
        start = torch.tensor([-1.5, -2.5, -4.2])
        rho = policy_ratio(logp, start, torch.ones(3) > 0, torch.tensor([0, 0, 1]), "sequence")
        assert rho.tolist() == pytest.approx([math.exp(0.5), math.exp(0.5), math.exp(0.2)])
        rho[0].backward()
        assert logp.grad is not None
        assert logp.grad.tolist() == pytest.approx([math.exp(0.5) / 2, math.exp(0.5) / 2, 0.0])


class TestRolloutCorrection:
    """Two sequences of two tokens with kappa = 4, 0.125, 0.6, 1.2 before any bound."""

    KAPPA = [4.0, 0.125, 0.6, 1.2]

    def kappas(self, correction: str, raw: list[float] | None = None) -> list[float]:
        behaviour = -torch.log(torch.tensor(raw or self.KAPPA)) - 1.0
        sampled_tokens, sequence = torch.ones(4) > 0, torch.tensor([0, 0, 1, 1])
        config = SurrogateConfig.model_validate({"correction": correction, "cap": 2.0, "floor": 0.5})
        return rollout_correction(-torch.ones(4), behaviour, sampled_tokens, sequence, config).tolist()

    @pytest.mark.parametrize(
        ("correction", "wanted"),
        [
            ("truncate", [2.0, 0.125, 0.6, 1.2]),
            ("mask", [0.0, 0.0, 0.6, 1.2]),
            ("sequence", [0.5, 0.5, 0.72, 0.72]),
            ("off", [1.0, 1.0, 1.0, 1.0]),
        ],
    )
    def test_every_kind(self, correction: str, wanted: list[float]) -> None:
        assert self.kappas(correction) == pytest.approx(wanted, rel=1e-6)

    def test_the_product_over_a_sequence_is_capped_as_a_whole_and_does_not_overflow(self) -> None:
        assert self.kappas("sequence", [1e30, 1e30, 1e30, 1e-30]) == pytest.approx([2.0, 2.0, 1.0, 1.0], rel=1e-5)

    @pytest.mark.parametrize("correction", ["truncate", "mask", "sequence", "off"])
    def test_it_is_exactly_1_where_the_engine_is_the_policy_or_nothing_was_sampled(self, correction: str) -> None:
        assert self.kappas(correction, [1.0] * 4) == [1.0] * 4
        config = SurrogateConfig.model_validate({"correction": correction})
        nowhere = torch.zeros(2) > 0
        found = rollout_correction(
            torch.tensor([-1.0, -math.inf]), torch.zeros(2), nowhere, torch.zeros(2).long(), config
        )
        assert found.tolist() == [1.0, 1.0]


class TestDemonstrationLoss:
    def test_chord_weights_tokens_by_p_1_minus_p_without_gradient(self) -> None:
        p = torch.tensor([0.5, 0.999999, 0.2, 0.3])
        logp = torch.log(p).requires_grad_()
        found = demonstration_loss(logp, logp.detach(), torch.tensor([1.0, 1.0, 1.0, 0.0]), "p_one_minus_p")
        found.sum().backward()
        assert logp.grad is not None
        assert logp.grad.tolist() == pytest.approx([-0.25, -1e-6, -0.16, 0.0], rel=0.05)
        assert found.tolist() == pytest.approx([0.25 * math.log(2), 0.0, -0.16 * math.log(0.2), 0.0], abs=1e-6)


class TestKl:
    def test_k3_is_never_negative_and_zero_for_equal_distributions(self) -> None:
        p, q = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -1.0])
        values = k3(p, q, torch.ones(3) > 0)
        assert (values >= 0).all()
        assert values[1] == 0

    def test_its_gradient_goes_through_the_policy(self) -> None:
        logp = torch.tensor([-1.0], requires_grad=True)
        k3(logp, torch.tensor([-1.7]), ONE > 0).sum().backward()
        assert logp.grad is not None
        assert logp.grad.item() == pytest.approx(1 - math.exp(-0.7), rel=1e-6)

    def test_a_weight_without_a_reference_is_refused(self) -> None:
        row = make_rows([[[sampled(kl=0.0)]]])
        with pytest.raises(ValueError, match="reference"):
            rows_loss(torch.zeros(3), row, torch.ones(4), weights(kl=0.1), ObjectiveConfig())

    def test_it_is_measured_where_a_reference_is_given_whatever_the_weight(self) -> None:
        found, gradient = run([sampled(kl=0.0), demonstrated()], weights(), torch.full((5,), -1.5))
        assert found.sums["sum/kl_reference"] == pytest.approx(3 * (math.exp(0.5) - 1.5), rel=1e-5)
        assert torch.equal(gradient, torch.zeros(5))


class TestUnifiedLoss:
    def test_every_term_is_divided_by_its_own_count(self) -> None:
        sequences = [sampled(3, preference=1.0, adversarial=-1.0), sampled(4, adversarial=2.0), demonstrated(2)]
        assert count_terms(sequences).tolist() == [2, 3, 7, 0]
        _, gradient = run(sequences, weights(preference=0.5, demonstration=0.25, adversarial=0.1))
        kappa = torch.exp(-torch.rand(9, generator=torch.Generator().manual_seed(0)) + 1.0).clamp(max=2)
        expected = torch.cat(
            [
                kappa[:3] * (-0.5 * 1.0 / 3 + 0.1 * 1.0 / 7),
                kappa[3:7] * (-0.1 * 2.0 / 7),
                torch.full((2,), -0.25 / 2),
            ]
        )
        assert gradient == pytest.approx(expected, rel=1e-5)

    def test_equal_rewards_give_exactly_zero_preference_gradient(self) -> None:
        found, gradient = run([sampled(preference=0.0), sampled(preference=0.0)], weights(preference=1.0))
        assert found.loss.item() == 0.0
        assert torch.equal(gradient, torch.zeros(6))

    @pytest.mark.parametrize("options", [{}, {"surrogate": {"ratio": "sequence", "correction": "sequence"}}], ids=str)
    def test_experts_and_demonstrations_without_weight_change_nothing_to_the_bit(self, options: dict[str, Any]) -> None:
        """A batch with experts and demonstrations gives, at mu = lambda = 0, what one without any gives."""
        batch = random_batch(1)
        bare = random_batch(1, demonstrations=0)
        for group in bare.groups:
            for sample in group.samples:
                assert sample.score is not None
                sample.score.expert_score = None
        found = []
        for each, tree in [(batch, options | {"adversarial": {"discriminator": "embedding"}}), (bare, options)]:
            objective, only = ObjectiveConfig.model_validate(tree), weights(preference=1.0)
            sequences = training_sequences(each, objective, 1.0, only, LONGEST)
            leaf = -torch.rand(sum(len(s.response_ids) for s in sequences), generator=torch.Generator().manual_seed(0))
            leaf.requires_grad_()
            loss = rows_loss(leaf, make_rows([[[s] for s in sequences]]), count_terms(sequences), only, objective).loss
            found.append((loss.item(), *torch.autograd.grad(loss, leaf)))
        assert found[0][0] == found[1][0] != 0.0
        assert torch.equal(found[0][1], found[1][1])

    def test_one_expert_token(self) -> None:
        _, gradient = run([demonstrated(1)], weights(demonstration=1.0))
        assert gradient.tolist() == [-1.0]

    @pytest.mark.parametrize("proximal", ["step_start", "behaviour"])
    def test_the_same_policy_as_the_engine_needs_no_correction(self, proximal: str) -> None:
        sequences = [sampled(preference=1.0), sampled(preference=-1.0)]
        found, _ = run(sequences, weights(preference=1.0), torch.full((6,), -1.0), proximal=proximal)
        assert {key: found.sums[key] for key in REDUCED if key.startswith(("tokens/", "sum/"))} == {
            "tokens/sampled": 6.0,
            "tokens/adversarial": 0.0,
            "tokens/demonstration": 0.0,
            "sum/ratio": 6.0,
            "sum/correction": 6.0,
            "sum/masked": 0.0,
            "sum/clipped": 0.0,
            "sum/clipped_adversarial": 0.0,
            "sum/kl": 0.0,
            "sum/kl_reference": 0.0,
            "sum/entropy_estimate": 6.0,
            "sum/expert_nll": 0.0,
        }

    @pytest.mark.parametrize("reference", [None, torch.zeros(0)])
    def test_a_row_without_sequences_gives_a_zero_that_can_be_differentiated(self, reference: Tensor | None) -> None:
        leaf = torch.zeros(0, requires_grad=True)
        given = weights(preference=1.0, demonstration=1.0, kl=0.0 if reference is None else 1.0)
        found = rows_loss(leaf, make_rows([]), torch.ones(4), given, ObjectiveConfig(), reference)
        found.loss.backward()
        assert found.loss.item() == 0.0
        assert tuple(found.sums) == REDUCED
        assert set(found.sums.values()) == {0.0}

    def test_sequences_that_no_weighted_term_counts_give_a_zero_that_can_be_differentiated(self) -> None:
        found, gradient = run([demonstrated()], weights(preference=1.0))
        assert (found.loss.item(), gradient.tolist()) == (0.0, [0.0, 0.0])
        assert found.sums["sum/expert_nll"] > 0

    def test_statistics_of_stale_samples(self) -> None:
        """One sample that the policy has moved away from, one that it has moved to, and a demonstration."""
        sequences = [
            sampled(1, behaviour=-1.0, preference=1.0, adversarial=-1.0),
            sampled(1, behaviour=-3.0, preference=1.0, adversarial=-1.0),
            demonstrated(2),
        ]
        given = weights(preference=1.0, adversarial=1.0)
        logprobs = torch.tensor([-2.0, -2.0, -0.5, -0.7])
        found, _ = run(sequences, given, logprobs, correction="mask", cap=3.0, floor=0.5)
        assert found.log_ratio.tolist() == [-1.0, 1.0]
        assert not found.log_ratio.requires_grad
        low, high = math.exp(-1), math.exp(1)
        wanted = {
            "tokens/sampled": 2,
            "tokens/demonstration": 2,
            "sum/ratio": low + high,
            "sum/correction": high,
            "sum/masked": 1,
            "sum/kl": low + high - 2,
            "sum/entropy_estimate": 4,
            "sum/expert_nll": 1.2,
        }
        assert {key: found.sums[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
        behind, _ = run(sequences, given, logprobs, proximal="behaviour")
        # rho = e^-1 and e: good tokens are clipped above, bad ones below.
        assert (behind.sums["sum/clipped"], behind.sums["sum/clipped_adversarial"]) == (1, 1)
        assert behind.sums["sum/correction"] == 2


class TestExtremes:
    """What no token says for itself must not become NaN for the others."""

    @pytest.mark.parametrize("ratio", ["token", "sequence"])
    @pytest.mark.parametrize("proximal", ["step_start", "behaviour"])
    @pytest.mark.parametrize("correction", ["truncate", "mask", "sequence", "off"])
    @pytest.mark.parametrize("behaviour", [-1e30, -math.inf, -200.0, 0.0])
    def test_behaviour_that_was_almost_impossible_keeps_loss_gradient_and_statistics_finite(
        self, behaviour: float, correction: str, proximal: str, ratio: str
    ) -> None:
        sequences = [
            sampled(2, behaviour, preference=1.0, adversarial=-1.0, kl=0.0),
            sampled(2, preference=-1.0, adversarial=1.0, kl=0.0),
            demonstrated(),
        ]
        given = weights(preference=1.0, adversarial=0.5, demonstration=1.0, kl=0.1)
        found, gradient = run(sequences, given, ratio=ratio, proximal=proximal, correction=correction)
        assert gradient.isfinite().all()
        assert found.finite.all()
        assert all(math.isfinite(value) for value in found.sums.values())
        assert gradient[2:4].abs().min() > 0, "the other sample still learns"

    def test_infinities_outside_a_term_do_not_reach_it(self) -> None:
        sequences = [sampled(1, preference=1.0), demonstrated(1)]
        for at, chosen in [(0, weights(demonstration=1.0)), (1, weights(preference=1.0))]:
            logprobs = torch.tensor([-1.0, -1.0])
            logprobs[at] = -math.inf
            found, gradient = run(sequences, chosen, logprobs)
            assert found.loss.item() == {0: 1.0, 1: -1.0}[at]
            assert gradient.tolist() == ([0.0, -1.0] if at == 0 else [-1.0, 0.0])

    def test_a_term_that_is_only_measured_names_its_token_too(self) -> None:
        logprobs = torch.tensor([-1.0, -math.inf, -1.0])
        found, _ = run([sampled(1, preference=1.0), demonstrated(2)], weights(preference=1.0), logprobs)
        assert found.loss.isfinite()
        assert found.finite.tolist() == [True, False, True]

    def test_float64_stays_float64(self) -> None:
        found, gradient = run([sampled(preference=1.0)], weights(preference=1.0), torch.full((3,), -1.2).double())
        assert (found.loss.dtype, gradient.dtype) == (torch.float64, torch.float64)
