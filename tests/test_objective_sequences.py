"""What the objective takes from a batch: shares of the terms, counts, packed signals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle_batches import make_objective

from uniapl.objective.rows import Rows, count_terms, make_rows
from uniapl.objective.sequences import TermShare, TrainingSequence, training_sequences
from uniapl.objective_config import TERMS
from uniapl.records import Demonstration, Group, MixedBatch, Prompt, Sample, Score, VersionSpan


def weights(**given: float) -> dict[str, float]:
    return dict.fromkeys(TERMS, 0.0) | given


def make_group(rewards: list[Any], experts: list[Any], lengths: list[int]) -> Group:
    samples = [
        Sample([9] * n, [-1.0] * n, [VersionSpan(0, n, 0)], "", "stop", Score(r, expert_score=e))
        for r, e, n in zip(rewards, experts, lengths, strict=True)
    ]
    return Group(0, Prompt("p", [], [1, 2]), samples, "a")


class TestSequences:
    def of(self, group: Group, given: dict[str, float], **sections: dict[str, Any]) -> list[TrainingSequence]:
        batch = MixedBatch(0, [group], [Demonstration("d", [1], [2, 3]), Demonstration("empty", [1], [])])
        return training_sequences(batch, make_objective(**sections), 0.7, given, 16)

    @pytest.mark.parametrize(
        ("average", "shares"),
        [
            ("token", [(1.0, 2.0), (1.0, 4.0)]),
            ("sequence", [(0.5, 1.0), (0.25, 1.0)]),
            ("constant", [(1.0, 16.0), (1.0, 16.0)]),
        ],
    )
    @pytest.mark.parametrize("term", ["preference", "adversarial", "kl"])
    def test_shares_by_average(self, term: str, average: str, shares: list[tuple[float, float]]) -> None:
        group = make_group([1.0, 0.0], [0.5, 0.1], [2, 4])
        section = "preference" if term == "kl" else term
        found = self.of(group, weights(**{term: 1.0}), **{section: {"average": average}})
        assert [(s.terms[term].token_weight, s.terms[term].count) for s in found] == shares
        assert [list(s.terms) for s in found] == [[term], [term]]
        assert count_terms(found)[TERMS.index(term)] == sum(count for _, count in shares)

    def test_samples_come_first_at_their_temperature_and_demonstrations_at_1(self) -> None:
        found = self.of(make_group([1.0, 0.0], [0.5, 0.1], [2, 4]), weights(preference=1.0, demonstration=1.0))
        assert [(s.id, s.temperature, s.sampled, len(s)) for s in found] == [
            ("p/0", 0.7, True, 4),
            ("p/1", 0.7, True, 6),
            ("d", 1.0, False, 3),
        ]
        assert found[2].terms == {"demonstration": TermShare(1.0, 2.0)}

    def test_prompts_without_an_expert_do_not_count_in_the_adversarial_term(self) -> None:
        found = self.of(make_group([1.0, 0.0], [None, None], [2, 2]), weights(preference=1.0, adversarial=0.5))
        assert [list(s.terms) for s in found] == [["preference"], ["preference"]]
        assert count_terms(found).tolist() == [0, 4, 0, 0]
        assert self.of(make_group([1.0, 0.0], [None, None], [2, 2]), weights(adversarial=0.5)) == []

    def test_an_empty_response_is_left_out_but_counts_in_the_group(self) -> None:
        found = self.of(make_group([1.0, 0.0], [0.5, 0.1], [3, 0]), weights(preference=1.0, adversarial=1.0, kl=1.0))
        assert [s.terms["preference"].advantage for s in found] == pytest.approx([1.0], abs=1e-5)
        assert [s.terms["adversarial"].advantage for s in found] == pytest.approx([1.0], abs=1e-4)
        assert count_terms(found).tolist() == [0, 3, 3, 3]

    def test_a_group_of_one_has_no_advantage_and_still_counts(self) -> None:
        found = self.of(make_group([1.0], [0.5], [3]), weights(preference=1.0, adversarial=1.0))
        assert found[0].terms == {"preference": TermShare(1.0, 3.0), "adversarial": TermShare(1.0, 3.0)}

    def test_each_term_has_its_own_normalisation(self) -> None:
        group = make_group([2.0, 0.0], [0.5, 0.1], [1, 1])
        given = weights(preference=1.0, adversarial=1.0)
        found = self.of(group, given, preference={"advantage_std": False})
        assert [s.terms["preference"].advantage for s in found] == [1.0, -1.0]
        assert [s.terms["adversarial"].advantage for s in found] == pytest.approx([1.0, -1.0], rel=1e-5)
        found = self.of(group, given, adversarial={"advantage_std": False})
        assert [s.terms["preference"].advantage for s in found] == pytest.approx([1.0, -1.0], rel=1e-5)
        assert [s.terms["adversarial"].advantage for s in found] == pytest.approx([0.2, -0.2])

    def test_as_reward_the_expert_score_shapes_the_reward_and_is_no_term(self) -> None:
        options = {"adversarial": {"as_reward": True}, "preference": {"advantage_std": False}}
        given = weights(preference=1.0, adversarial=0.5)
        group = make_group([1.0, 0.0, 1.0], [0.2, 0.8, 0.6], [1, 1, 1])
        found = self.of(group, given, **options)
        shaped = [1.1, 0.4, 1.3]
        assert [s.terms["preference"].advantage for s in found] == pytest.approx([r - 2.8 / 3 for r in shaped])
        assert [list(s.terms) for s in found] == [["preference"]] * 3
        one_without = make_group([1.0, 0.0, 1.0], [0.2, 0.8, None], [1, 1, 1])
        for plain in (self.of(group, weights(preference=1.0), **options), self.of(one_without, given, **options)):
            assert [s.terms["preference"].advantage for s in plain] == pytest.approx([1 / 3, -2 / 3, 1 / 3])

    def test_an_unscored_sample_reaches_no_preference_term(self) -> None:
        group = make_group([1.0, None], [0.1, 0.2], [1, 1])
        with pytest.raises(ValueError, match="prompt p: a sample without a reward"):
            self.of(group, weights(preference=1.0))
        assert len(self.of(group, weights(adversarial=1.0))) == 2

    def test_terms_without_weight_ask_for_nothing(self) -> None:
        group = make_group([1.0, 0.0], [0.5, 0.4], [2, 2])
        assert count_terms(self.of(group, weights(preference=1.0))).tolist() == [0, 4, 0, 0]
        assert count_terms(self.of(group, weights(demonstration=1.0))).tolist() == [2, 0, 0, 0]
        assert count_terms(self.of(group, weights(kl=1.0))).tolist() == [0, 0, 0, 4]
        assert self.of(group, weights()) == []

    def test_a_lagrangian_weight_of_zero_is_still_measured(self) -> None:
        group = make_group([1.0, 0.0], [0.5, 0.4], [2, 2])
        sections = {term: {"weight": {"kind": "lagrangian"}} for term in ("demonstration", "adversarial", "kl")}
        assert count_terms(self.of(group, weights(), **sections)).tolist() == [2, 0, 0, 4]


class TestRows:
    def row(self) -> Rows:
        """A sample and a demonstration in one row, a sample in another."""
        first = {"preference": TermShare(1.0, 3, 0.5), "kl": TermShare(0.25, 1)}
        return make_rows(
            [
                [
                    [TrainingSequence("a", [1, 2], [3, 4, 5], 0.7, [-1.0, -2.0, -3.0], first)],
                    [TrainingSequence("d", [1, 2, 3], [4, 5], 1.0, terms={"demonstration": TermShare(1.0, 2)})],
                ],
                [[TrainingSequence("b", [1, 2], [3], 0.7, [-4.0], {"adversarial": TermShare(1.0, 1, -2.0)})]],
            ]
        )

    def test_a_row_points_every_target_at_the_token_before_it(self) -> None:
        row = self.row()
        first = [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]
        assert row.input_ids.tolist() == [first + [0] * 22, [1, 2, 3] + [0] * 29]  # to a multiple of WIDTH_STEP
        assert row.position_ids[0, :10].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
        assert row.index.tolist() == [1, 2, 3, 7, 8, 32 + 1]
        assert row.targets.tolist() == [3, 4, 5, 4, 5, 3]

    def test_signals_stand_in_the_order_of_the_sequences(self) -> None:
        row = self.row()
        assert row.sequence.tolist() == [0, 0, 0, 1, 1, 2]
        assert row.sampled.tolist() == [1, 1, 1, 0, 0, 1]
        assert row.demonstration.tolist() == [0, 0, 0, 1, 1, 0]
        assert row.preference.tolist() == [1, 1, 1, 0, 0, 0]
        assert row.preference_advantage.tolist() == [0.5, 0.5, 0.5, 0, 0, 0]
        assert row.adversarial.tolist() == [0, 0, 0, 0, 0, 1]
        assert row.adversarial_advantage.tolist() == [0, 0, 0, 0, 0, -2]
        assert row.kl.tolist() == [0.25, 0.25, 0.25, 0, 0, 0]
        assert row.behaviour.tolist() == [-1, -2, -3, 0, 0, -4]
        assert row.temperature.tolist() == pytest.approx([0.7, 0.7, 0.7, 1, 1, 0.7])

    def test_moving_keeps_every_column(self) -> None:
        row = self.row()
        moved = row.to("cpu")
        assert torch.equal(moved.sequence, row.sequence)
        assert torch.equal(moved.kl, row.kl)
