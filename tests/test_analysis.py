"""Held-out results: pass rates with honest intervals, and the distance between policy and expert."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniapl import analysis
from uniapl.analysis import EvaluatedSample, Evaluation
from uniapl.runlog import RunError

numbers = st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=1, max_size=12)


def sample(prompt_id, reward, checks=None, tokens=3, logprobs=(-0.5, -1.0, -2.0)):
    return EvaluatedSample(prompt_id, f"Say {prompt_id}", "ok", tokens, reward, checks or {}, "fine", list(logprobs))


def evaluation(rewards, **fields):
    samples = [sample(f"p{i}", reward) for i, reward in enumerate(rewards)]
    return Evaluation(**({"step": 0, "samples": samples, "expert_lengths": [], "expert_token_logprobs": []} | fields))


def test_an_evaluation_read_back_is_the_one_saved(tmp_path):
    saved = Evaluation(30, [sample("a", 1.0, {"x": True}), sample("b", None)], [7], [-0.25])
    saved.save(tmp_path / "eval" / "after.json")
    assert Evaluation.load(tmp_path / "eval" / "after.json") == saved


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"step": NaN, "samples": []}', "{}", '{"step": 1, "samples": [{"prompt": "x"}]}', '{"samples": 3}'],
)
def test_a_file_that_is_no_evaluation_is_named(tmp_path, text):
    path = tmp_path / "before.json"
    path.write_text(text)
    with pytest.raises(RunError, match=r"before\.json: not a saved evaluation; allowed: "):
        Evaluation.load(path)


def test_a_missing_evaluation_is_named(tmp_path):
    with pytest.raises(RunError, match=r"after\.json: No such file or directory; allowed: "):
        Evaluation.load(tmp_path / "after.json")


def test_an_evaluation_with_a_number_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(RunError, match="not finite"):
        evaluation([1.0], expert_token_logprobs=[float("-inf")]).save(tmp_path / "after.json")
    assert list(tmp_path.iterdir()) == []


def test_a_sample_passes_when_all_of_its_checks_hold_whatever_its_reward():
    assert sample("a", 0.5, {"x": True, "y": True}).passed is True
    assert sample("a", 0.5, {"x": True, "y": False}).passed is False


def test_a_sample_without_checks_passes_with_the_full_reward():
    assert (sample("a", 1.0).passed, sample("a", 0.99).passed) == (True, False)


def test_unscored_samples_are_counted_and_left_out_of_every_rate():
    made = Evaluation(0, [sample("a", 1.0, {"x": True}), sample("b", None, {"x": False})], [], [])
    assert made.unscored == 1
    assert made.pass_rate.value == 1.0 and made.pass_rate.count == 1
    assert made.check_rates["x"].value == 1.0


def test_nothing_scored_has_no_pass_rate():
    assert evaluation([None, None]).pass_rate is None
    assert evaluation([]).pass_rate is None


def test_wilson_interval_agrees_with_published_values():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for hits, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        interval = analysis.wilson_interval(hits / count, count)
        assert (interval.low, interval.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_several_samples_of_a_prompt_do_not_narrow_the_interval():
    once = Evaluation(0, [sample("a", 1.0), sample("b", 0.0)], [], [])
    often = Evaluation(0, once.samples * 50, [], [])
    assert often.pass_rate == once.pass_rate


def test_check_rates_count_only_the_samples_that_a_check_applies_to():
    made = Evaluation(0, [sample("a", 1.0, {"x": True}), sample("b", 0.0, {"x": False, "y": True})], [], [])
    assert {name: (rate.value, rate.count) for name, rate in made.check_rates.items()} == {"x": (0.5, 2), "y": (1.0, 1)}


def test_paired_difference_agrees_with_bonett_and_price():
    # 20 prompts: 8 gained, 2 lost; p = 9/22 and 3/22 after adding one each.
    before, after = evaluation([0] * 8 + [1] * 2 + [1] * 10), evaluation([1] * 8 + [0] * 2 + [1] * 10)
    found = analysis.paired_difference(before, after)
    assert (found.gained, found.lost, found.difference.count) == (8, 2, 20)
    assert found.difference.value == pytest.approx(0.3)
    half = 1.959964 * np.sqrt((9 / 22 + 3 / 22 - (6 / 22) ** 2) / 22)
    assert found.difference.low == pytest.approx(6 / 22 - half)
    assert found.difference.high == pytest.approx(6 / 22 + half)


def test_no_change_still_leaves_room_for_doubt():
    same = analysis.paired_difference(evaluation([1, 0, 1]), evaluation([1, 0, 1])).difference
    assert same.value == 0 and same.low < -0.2 and same.high > 0.2


def test_only_prompts_scored_both_times_are_paired():
    found = analysis.paired_difference(evaluation([0, None, 1]), evaluation([1, 1, None]))
    assert (found.difference.count, found.difference.value) == (1, 1.0)
    assert analysis.paired_difference(evaluation([None]), evaluation([1])) is None


@given(numbers, st.integers(-8, 8))
def test_moving_all_values_by_d_costs_d(values, d):
    assert analysis.wasserstein_1(values, [value + d for value in values]) == pytest.approx(abs(d))


@given(numbers)
def test_wasserstein_of_equally_many_values_pairs_them_in_order(values):
    other = [value * value for value in values]
    expected = np.mean(np.abs(np.sort(values) - np.sort(other)))
    assert analysis.wasserstein_1(values, other) == pytest.approx(expected)


@given(numbers, numbers)
def test_distances_are_symmetric_and_zero_only_between_equal_distributions(a, b):
    for distance in (analysis.wasserstein_1, analysis.ks_distance):
        assert distance(a, b) == pytest.approx(distance(b, a))
        assert distance(a, a * 3) == pytest.approx(0)
        if sorted(a * len(b)) != sorted(b * len(a)):
            assert distance(a, b) > 0


def test_ks_distance_is_the_largest_gap_of_the_distribution_functions():
    assert analysis.ks_distance([1, 2, 3, 4], [3, 4, 5, 6]) == 0.5
    assert analysis.ks_distance([1, 2], [3, 4]) == 1.0


@given(numbers, numbers)
def test_every_value_falls_into_a_bin_and_fractions_sum_to_one(a, b):
    edges = analysis.shared_edges([a, b], bins=5)
    assert all(low < high for low, high in itertools.pairwise(edges))
    for values in (a, b):
        assert sum(analysis.histogram(values, edges)) == pytest.approx(1.0)


def test_whole_numbers_get_bins_that_hold_equally_many_of_them():
    edges = analysis.shared_edges([list(range(1, 65))], bins=16, tail=0)
    assert edges[0] == 0.5 and edges[-1] == 64.5
    assert analysis.histogram(list(range(1, 65)), edges) == [1 / 16] * 16


def test_before_and_after_are_compared_over_the_same_bins():
    before = evaluation([1, 0], expert_lengths=[40, 50, 60])
    after = Evaluation(9, [sample("a", 1.0, tokens=45), sample("b", 1.0, tokens=52)], [40, 50, 60], [])
    first, second = analysis.compare_lengths([before, after])
    assert first.edges == second.edges
    assert second.wasserstein < first.wasserstein == pytest.approx(47.0)
    assert second.expert_mean == 50.0 and second.policy_mean == 48.5


def test_logprobs_of_own_samples_are_held_against_those_of_the_experts_tokens():
    [found] = analysis.compare_logprobs([evaluation([1], expert_token_logprobs=[-3.0, -4.0])])
    assert (found.policy_mean, found.expert_mean) == (pytest.approx(-3.5 / 3), -3.5)


def test_an_evaluation_without_expert_responses_has_no_comparison():
    full, empty = evaluation([1], expert_lengths=[4]), evaluation([1])
    assert analysis.compare_lengths([empty]) == [None]
    assert [found is None for found in analysis.compare_lengths([full, empty])] == [False, True]


def test_a_saved_evaluation_is_plain_json(tmp_path):
    evaluation([1.0]).save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["samples"][0]["prompt_id"] == "p0"
