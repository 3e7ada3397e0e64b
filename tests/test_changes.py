"""What training changed, with intervals: right in simple cases, honest in simulated ones."""

import dataclasses

import numpy as np
import pytest

from uniapl.analysis import EvaluatedSample, Evaluation, wasserstein_1
from uniapl.changes import Change, changes, distance_changes, jensen_shannon


def evaluation(rewards=(), lengths=None, logprobs=None, experts=(), expert_logprobs=()):
    """One sample per prompt; `experts`: lengths of the expert's responses."""
    lengths = lengths or [3] * len(rewards)
    logprobs = logprobs or [[-1.0] * n for n in lengths]
    samples = [
        EvaluatedSample(f"p{i}", "say", "ok", n, reward, {}, "fine", list(values))
        for i, (reward, n, values) in enumerate(zip(rewards, lengths, logprobs, strict=True))
    ]
    return Evaluation(0, samples, list(experts), list(expert_logprobs))


def by_name(found):
    return {change.name: change for change in found}


def test_reward_and_likelihood_are_means_and_their_difference_is_of_the_same_prompts():
    experts = [2] * 10
    before = evaluation([0.0] * 9 + [None], experts=experts, expert_logprobs=[-2.0, -1.0] * 10)
    after = evaluation([0.5] * 10, experts=experts, expert_logprobs=[-1.0, -0.5] * 10)
    reward, nll = (by_name(changes(before, after))[k] for k in ("Reward", "Expert's negative log-likelihood"))
    assert (reward.before.value, reward.before.count, reward.after.value, reward.after.count) == (0, 9, 0.5, 10)
    assert (reward.difference.value, reward.difference.count, reward.verdict) == (0.5, 9, "better")
    assert (nll.before.value, nll.after.value, nll.difference.value) == (1.5, 0.75, -0.75)
    assert nll.verdict == "better"


def test_tokens_count_alike_but_prompts_are_what_is_resampled():
    """Of one long and many short responses the long one weighs by its tokens, and the interval is wide for it."""
    lengths = [91] + [1] * 9
    one = evaluation([1.0] * 10, experts=lengths, expert_logprobs=[-2.0] * 91 + [-1.0] * 9)
    nll = by_name(changes(one, None))["Expert's negative log-likelihood"].before
    assert nll.value == pytest.approx(1.91) and nll.count == 10
    assert nll.high - nll.low > 0.3


@pytest.mark.parametrize(
    ("difference", "count", "verdict"),
    [
        ((0.1, 0.05, 0.2), 20, "better"),
        ((-0.1, -0.2, -0.05), 20, "worse"),
        ((0.1, -0.05, 0.2), 20, "no significant change"),
        ((0.1, 0.05, 0.2), 7, "too few prompts to tell"),
    ],
)
def test_only_an_interval_that_leaves_out_0_is_called_a_change(difference, count, verdict):
    from uniapl.analysis import Interval

    change = Change("x", "", 1, None, None, Interval(*difference, count))
    assert change.verdict == verdict
    if verdict in ("better", "worse"):
        assert {change.verdict, dataclasses.replace(change, better=-1).verdict} == {"better", "worse"}


def test_distances_are_those_of_all_values_and_shrink_with_the_policy_coming_closer():
    rng = np.random.default_rng(1)
    experts = [int(n) for n in rng.integers(20, 40, 60)]
    far, near = ([int(n) + shift for n in experts] for shift in (15, 3))
    logs = [list(-rng.exponential(1.0, n)) for n in experts]
    flat = [value for values in logs for value in values]
    before, after = (
        evaluation([1.0] * 60, lengths, [list(-rng.exponential(s, n)) for n in lengths], experts, flat)
        for lengths, s in ((far, 2.0), (near, 1.1))
    )
    found = by_name(distance_changes(before, after))
    assert len(found) == 4
    lengths = found["Response length: Wasserstein-1 to the expert"]
    assert (lengths.before.value, lengths.after.value) == (wasserstein_1(far, experts), wasserstein_1(near, experts))
    assert lengths.before.value == pytest.approx(15) and lengths.difference.value == pytest.approx(-12)
    for change in found.values():
        assert change.verdict == "better", change.name
        for interval in (change.before, change.after, change.difference):
            assert interval.low <= interval.value <= interval.high and interval.count == 60
        assert change.before.low >= 0


def test_evaluations_of_other_prompts_have_no_difference():
    before = evaluation([1.0] * 9, experts=[2] * 9, expert_logprobs=[-1.0] * 18)
    other = [dataclasses.replace(s, prompt_id=f"other-{s.prompt_id}") for s in before.samples]
    found = changes(before, dataclasses.replace(before, samples=other))
    found += distance_changes(before, dataclasses.replace(before, samples=other))
    assert len(found) == 7 and all(change.difference is None and change.verdict == "" for change in found)


def test_what_is_not_there_is_left_out():
    assert changes(None, None) == distance_changes(None, None) == []
    alone = evaluation([1.0, 0.0])
    assert [change.name for change in changes(alone, None)] == ["Pass rate", "Reward"]
    assert distance_changes(alone, None) == []
    damaged = evaluation([1.0], experts=[5], expert_logprobs=[-1.0])  # fewer values than the lengths say
    assert [change.name for change in changes(damaged, None)] == ["Pass rate", "Reward"]


def test_jensen_shannon_is_0_for_equal_and_1_bit_for_disjoint_histograms():
    assert jensen_shannon([0.5, 0.5, 0], [0.5, 0.5, 0]) == 0
    assert jensen_shannon([1, 0], [0, 1]) == pytest.approx(1)
    assert jensen_shannon([0.5, 0.5], [1, 0]) == pytest.approx(0.311278, abs=1e-6)  # by hand: 1.5 - 0.75 log2 3


def test_the_interval_of_a_mean_reward_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        old = rng.normal(0.3, 0.2, 40)
        new = old + rng.normal(0.1, 0.15, 40)
        difference = by_name(changes(evaluation(list(old)), evaluation(list(new))))["Reward"].difference
        held += difference.low <= 0.1 <= difference.high
    assert 180 <= held <= 197  # 95 %: 190, give or take two standard deviations and the bootstrap's own shortness
