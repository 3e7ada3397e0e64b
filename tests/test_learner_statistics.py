"""Metrics of a step from its sums, without a process group."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.statistics import checked_loss, importance_metrics, step_metrics
from uniapl.objective.objective import REDUCED

TOKENS = ("tokens/trained", "tokens/rows", "tokens/computed", "tokens/reference", "tokens/entropy")
BARE = dict.fromkeys((*REDUCED, *TOKENS, "sum/entropy", "loss/total"), 0.0) | {"tokens/rows": 10.0}


class TestImportanceWeights:
    def test_none_without_tokens(self) -> None:
        assert importance_metrics(torch.zeros(0)) == {}

    def test_equal_weights_are_worth_all_their_tokens(self) -> None:
        found = importance_metrics(torch.full((7,), math.log(3.0)))
        assert found.pop("importance/ess") == pytest.approx(1.0)
        assert all(value == pytest.approx(3.0) for value in found.values())

    def test_one_weight_above_all_others_is_worth_one_token(self) -> None:
        found = importance_metrics(torch.tensor([0.0] * 9 + [600.0]))
        assert found["importance/ess"] == pytest.approx(0.1)
        assert found["importance/p50"] == 1.0

    @given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=30))
    def test_every_number_is_finite_and_in_order(self, logs: list[float]) -> None:
        found = importance_metrics(torch.tensor(logs, dtype=torch.float64))
        assert all(math.isfinite(value) for value in found.values())
        quantiles = [found[f"importance/{name}"] for name in ("min", "p01", "p50", "p99", "max")]
        assert quantiles == sorted(quantiles)
        assert 1 / len(logs) - 1e-9 <= found["importance/ess"] <= 1 + 1e-9


@pytest.mark.parametrize("key", ["loss/total", "loss/demonstration", "loss/kl"])
def test_a_term_that_is_only_measured_is_checked_like_the_loss(key: str) -> None:
    assert checked_loss(BARE | {"loss/total": 2.0}) == 2.0
    assert checked_loss(BARE | {key: math.inf}) == math.inf


class TestStepMetrics:
    WEIGHTS = {"demonstration": 0.5, "preference": 0.0, "adversarial": 0.2, "kl": 0.0}

    def found(self, **totals: float) -> dict[str, float]:
        sums = BARE | {key.replace("__", "/"): value for key, value in totals.items()}
        return step_metrics(sums, torch.tensor([4.0, 6.0, 6.0, 6.0]), self.WEIGHTS)

    def test_a_share_is_of_the_weighted_sizes(self) -> None:
        found = self.found(loss__demonstration=2.0, loss__adversarial=-5.0, loss__preference=9.0)
        assert (found["share/demonstration"], found["share/adversarial"]) == (0.5, 0.5)

    def test_a_term_without_weight_is_left_out(self) -> None:
        found = self.found(tokens__sampled=6.0, tokens__adversarial=4.0, sum__clipped_adversarial=1.0)
        assert not any("preference" in key or key in ("loss/kl", "ratio/clip_fraction") for key in found)
        assert found["ratio/clip_fraction_adversarial"] == 0.25, "of the tokens that the term counts"

    def test_what_was_not_measured_is_left_out(self) -> None:
        assert not self.found().keys() & {"expert/nll", "ratio/mean", "kl/reference", "entropy/exact"}

    def test_a_mean_is_over_the_tokens_that_were_measured(self) -> None:
        found = self.found(
            tokens__sampled=6.0,
            tokens__adversarial=6.0,
            tokens__reference=6.0,
            sum__kl_reference=3.0,
            sum__entropy_estimate=12.0,
        )
        assert found["kl/reference"] == 0.5
        assert found["entropy/estimate"] == 2.0
