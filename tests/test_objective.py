"""The objective's terms against direct formulas, and its degenerate cases."""

from __future__ import annotations

import math

import pytest
import torch

from uniapl.config import AdversarialTerm, DemonstrationTerm, ObjectiveConfig, PreferenceTerm
from uniapl.objective.advantages import group_advantages
from uniapl.objective.objective import rows_loss
from uniapl.objective.rows import count_tokens, make_rows
from uniapl.objective.sequences import TrainingSequence, training_sequences
from uniapl.objective.terms import k3, surrogate_loss
from uniapl.records import Demonstration, Group, MixedBatch, Prompt, Sample, Score, VersionSpan


def sampled(advantage: float | None, length: int = 3, adversarial: float | None = None) -> TrainingSequence:
    return TrainingSequence(
        "s", [1, 2], list(range(3, 3 + length)), 1.0, [-1.0] * length, False, advantage, adversarial
    )


def demonstrated(length: int = 2) -> TrainingSequence:
    return TrainingSequence("d", [1, 2, 3], list(range(4, 4 + length)), 1.0, demonstration=True)


def objective(preference: float = 1.0, demonstration: float = 0.0, adversarial: float = 0.0) -> ObjectiveConfig:
    return ObjectiveConfig(
        preference=PreferenceTerm(weight=preference),
        demonstration=DemonstrationTerm(weight=demonstration),
        adversarial=AdversarialTerm(weight=adversarial, discriminator="embedding" if adversarial else "none"),
    )


def loss_and_gradient(sequences: list[TrainingSequence], config: ObjectiveConfig) -> tuple[float, torch.Tensor]:
    row = make_rows([[[s] for s in sequences]])
    generator = torch.Generator().manual_seed(0)
    logprobs = (-torch.rand(len(row.targets), generator=generator)).requires_grad_()
    result = rows_loss(logprobs, row, count_tokens(sequences), config)
    result.loss.backward()
    assert logprobs.grad is not None
    return result.loss.item(), logprobs.grad


class TestAdvantages:
    def test_centred_and_divided_by_the_population_std(self) -> None:
        assert group_advantages([0.0, 1.0], True) == pytest.approx([-1.0, 1.0], abs=1e-5)
        assert group_advantages([1.0, 2.0, 6.0], False) == [-2.0, -1.0, 3.0]

    @pytest.mark.parametrize("values", [[0.3, 0.3, 0.3], [1.0], []])
    def test_equal_values_or_a_single_sample_give_exactly_zero(self, values: list[float]) -> None:
        assert group_advantages(values, True) == [0.0] * len(values)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_values_that_are_not_finite_are_refused(self, bad: float) -> None:
        with pytest.raises(ValueError, match="finite"):
            group_advantages([0.0, bad], True)


class TestSurrogate:
    def parts(self, ratio: float, advantage: float, kappa: float = 1.0, cap: float = 2.0) -> tuple[float, float]:
        """Loss and its gradient in log pi for one token with these ratios."""
        logp = torch.tensor([-1.0 + math.log(ratio)], requires_grad=True)
        proximal = torch.tensor([-1.0])
        behaviour = proximal - math.log(kappa)
        one = torch.ones(1)
        found = surrogate_loss(logp, proximal, behaviour, advantage * one, one, 0.2, 0.3, cap)
        found.loss.sum().backward()
        assert logp.grad is not None
        return found.loss.item(), logp.grad.item()

    def test_inside_the_clip_it_is_minus_ratio_times_advantage(self) -> None:
        assert self.parts(1.1, 2.0) == pytest.approx((-2.2, -2.2), rel=1e-6)

    def test_a_good_token_beyond_the_upper_clip_has_no_gradient(self) -> None:
        assert self.parts(1.5, 2.0) == pytest.approx((-2.6, 0.0), rel=1e-6)

    def test_a_bad_token_below_the_lower_clip_has_no_gradient(self) -> None:
        assert self.parts(0.5, -2.0) == pytest.approx((1.6, 0.0), rel=1e-6)

    def test_a_bad_token_beyond_the_upper_clip_is_pushed_back(self) -> None:
        assert self.parts(1.5, -2.0) == pytest.approx((3.0, 3.0), rel=1e-6)

    def test_the_rollout_correction_multiplies_and_is_capped(self) -> None:
        assert self.parts(1.0, 1.0, kappa=1.5)[0] == pytest.approx(-1.5, rel=1e-6)
        assert self.parts(1.0, 1.0, kappa=50.0)[0] == pytest.approx(-2.0, rel=1e-6)

    def test_outside_the_mask_nothing_counts_not_even_infinities(self) -> None:
        logp = torch.tensor([-1.0, -2.0], requires_grad=True)
        behaviour = torch.tensor([-1.0, -math.inf])
        found = surrogate_loss(
            logp, logp.detach(), behaviour.clamp(min=-1e30), torch.ones(2), torch.tensor([1.0, 0.0]), 0.2, 0.2, 2.0
        )
        found.loss.sum().backward()
        assert found.loss.tolist() == [-1.0, 0.0]
        assert logp.grad is not None and logp.grad.tolist() == [-1.0, 0.0]


class TestUnifiedLoss:
    def test_every_term_is_divided_by_its_own_count(self) -> None:
        sequences = [sampled(1.0, 3, adversarial=-1.0), sampled(None, 4, adversarial=2.0), demonstrated(2)]
        assert count_tokens(sequences).tolist() == [2, 3, 7]
        _, gradient = loss_and_gradient(sequences, objective(0.5, 0.25, 0.1))
        row = make_rows([[[s] for s in sequences]])
        kappa = torch.exp(-torch.rand(len(row.targets), generator=torch.Generator().manual_seed(0)) + 1.0).clamp(max=2)
        expected = torch.cat(
            [
                kappa[:3] * (-0.5 * 1.0 / 3 + 0.1 * 1.0 / 7),
                kappa[3:7] * (-0.1 * 2.0 / 7),
                torch.full((2,), -0.25 / 2),
            ]
        )
        assert gradient == pytest.approx(expected, rel=1e-5)

    def test_equal_rewards_give_exactly_zero_preference_gradient(self) -> None:
        loss, gradient = loss_and_gradient([sampled(0.0), sampled(0.0)], objective())
        assert loss == 0.0
        assert torch.equal(gradient, torch.zeros(6))

    def test_without_the_other_weights_it_is_grpo_to_the_bit(self) -> None:
        both = [sampled(1.0, adversarial=0.7), sampled(-1.0, adversarial=-0.7)]
        only = [sampled(1.0), sampled(-1.0)]
        loss, gradient = loss_and_gradient(both, objective(1.0, 0.0, 0.0))
        expected_loss, expected_gradient = loss_and_gradient(only, objective(1.0))
        assert loss == expected_loss
        assert torch.equal(gradient, expected_gradient)

    def test_one_expert_token(self) -> None:
        _, gradient = loss_and_gradient([demonstrated(1)], objective(0.0, 1.0))
        assert gradient.tolist() == [-1.0]

    def test_the_same_policy_as_the_engine_needs_no_correction(self) -> None:
        row = make_rows([[[sampled(1.0)], [sampled(-1.0)]]])
        result = rows_loss(row.behaviour.clone().requires_grad_(), row, torch.tensor([0, 6, 0]), objective())
        n = result.sums["tokens/sampled"]
        assert (result.sums["sum/correction"] / n, result.sums["sum/ratio"] / n, result.sums["sum/kl"]) == (1.0, 1.0, 0)

    def test_a_row_without_sequences_gives_a_zero_that_can_be_differentiated(self) -> None:
        row = make_rows([])
        result = rows_loss(torch.zeros(0, requires_grad=True), row, torch.tensor([1, 1, 1]), objective(1.0, 1.0))
        result.loss.backward()
        assert result.loss.item() == 0.0

    def test_k3_is_never_negative_and_zero_for_equal_distributions(self) -> None:
        p, q = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -1.0])
        values = k3(p, q, torch.ones(3))
        assert (values >= 0).all()
        assert values[1] == 0


class TestSequences:
    def group(self, rewards: list[float | None], experts: list[float | None], lengths: list[int]) -> Group:
        samples = [
            Sample([9] * n, [-1.0] * n, [VersionSpan(0, n, 0)], "", "stop", Score(r, expert_score=e))
            for r, e, n in zip(rewards, experts, lengths, strict=True)
        ]
        return Group(0, Prompt("p", [], [1, 2]), samples, "a")

    def test_prompts_without_an_expert_do_not_count_in_the_adversarial_term(self) -> None:
        batch = MixedBatch(0, [self.group([1.0, 0.0], [None, None], [2, 2])], [])
        found = training_sequences(batch, objective(1.0, 0.0, 0.5), 1.0)
        assert [s.adversarial_advantage for s in found] == [None, None]
        assert count_tokens(found).tolist() == [0, 4, 0]

    def test_an_empty_response_is_left_out_but_counts_in_the_group(self) -> None:
        batch = MixedBatch(0, [self.group([1.0, 0.0], [None, None], [3, 0])], [])
        found = training_sequences(batch, objective(), 1.0)
        assert [s.preference_advantage for s in found] == pytest.approx([1.0], abs=1e-5)

    def test_an_unscored_sample_never_reaches_the_objective(self) -> None:
        batch = MixedBatch(0, [self.group([1.0, None], [None, None], [1, 1])], [])
        with pytest.raises(ValueError, match="prompt p: a sample without a reward"):
            training_sequences(batch, objective(), 1.0)

    def test_terms_without_weight_ask_for_nothing(self) -> None:
        group = self.group([1.0, 0.0], [0.5, 0.4], [2, 2])
        batch = MixedBatch(0, [group], [Demonstration("d", [1], [2])])
        found = training_sequences(batch, objective(1.0, 0.0, 0.0), 1.0)
        assert count_tokens(found).tolist() == [0, 4, 0]

    def test_a_row_points_every_target_at_the_token_before_it(self) -> None:
        row = make_rows([[[sampled(1.0, 3)], [demonstrated(2)]]])
        assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 4, 5]]
        assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
        assert row.index.tolist() == [1, 2, 3, 7, 8]
        assert row.targets.tolist() == [3, 4, 5, 4, 5]
        assert row.demonstration.tolist() == [0, 0, 0, 1, 1]
