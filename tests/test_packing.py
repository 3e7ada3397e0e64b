"""Packing: every sequence once, no row over budget, few rows, rows and ranks of even length."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniapl.packing import longest_row, pack, pack_balanced, partition

BUDGET = 240
lengths_of = st.lists(st.integers(1, BUDGET), max_size=60)


def every_item_once(rows, lengths):
    return sorted(index for row in rows for index in row) == list(range(len(lengths)))


def fewest_rows_by_search(lengths, budget):
    """The true optimum, by trying every assignment."""
    for rows in range(len(lengths) + 1):
        for choice in product(range(rows), repeat=len(lengths)):
            loads = [sum(n for n, at in zip(lengths, choice, strict=True) if at == row) for row in range(rows)]
            if max(loads, default=0) <= budget:
                return rows
    raise AssertionError("unreachable")


@given(lengths_of)
def test_pack_holds_every_sequence_once_within_the_budget(lengths):
    rows = pack(lengths, BUDGET)
    assert every_item_once(rows, lengths)
    assert all(row for row in rows)
    assert longest_row(lengths, rows) <= BUDGET


@given(st.lists(st.integers(1, BUDGET // 4), max_size=200))
def test_pack_needs_at_most_a_quarter_more_rows_than_the_tokens_do(lengths):
    at_least = -(-sum(lengths) // BUDGET)
    assert len(pack(lengths, BUDGET)) <= 1.25 * at_least + 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=6))
def test_pack_is_near_the_true_optimum_for_sequences_of_any_length(lengths):
    assert len(pack(lengths, 12)) <= (11 * fewest_rows_by_search(lengths, 12) + 6) / 9


def test_pack_fills_rows_with_what_fits_best():
    assert pack([60, 50, 50, 40], 100) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("make", [pack, pack_balanced])
def test_a_sequence_longer_than_a_row_is_named(make):
    with pytest.raises(ValueError, match=r"^sequence 1 has 101 tokens; allowed: 0 to 100, one row$"):
        make([7, 101], 100)


@given(lengths_of)
def test_balanced_packing_never_makes_the_longest_row_longer(lengths):
    rows, balanced = pack(lengths, BUDGET), pack_balanced(lengths, BUDGET)
    assert len(balanced) == len(rows)
    assert every_item_once(balanced, lengths)
    assert longest_row(lengths, balanced) <= longest_row(lengths, rows) <= BUDGET


@given(st.lists(st.integers(1, BUDGET // 4), min_size=1, max_size=100))
def test_balanced_rows_are_even_to_within_one_sequence(lengths):
    rows = pack_balanced(lengths, BUDGET)
    assert longest_row(lengths, rows) <= sum(lengths) / len(rows) + max(lengths)


def test_balanced_packing_evens_out_what_first_packing_leaves_ragged():
    lengths = [30, 30, 30, 30, 30, 30]
    assert [len(row) for row in pack(lengths, 150)] == [5, 1]
    assert [len(row) for row in pack_balanced(lengths, 150)] == [3, 3]


@given(st.lists(st.integers(0, 1000), max_size=50), st.integers(1, 8))
def test_partition_gives_every_item_to_one_rank(costs, ranks):
    shares = partition(costs, ranks)
    assert len(shares) == ranks
    assert every_item_once(shares, costs)
    assert all(share == sorted(share) for share in shares)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 3))
def test_partition_loads_are_within_a_third_of_the_best_possible(costs, ranks):
    choices = product(range(ranks), repeat=len(costs))
    loads = (
        [sum(c for c, at in zip(costs, choice, strict=True) if at == r) for r in range(ranks)] for choice in choices
    )
    best = min(max(load) for load in loads)
    assert longest_row(costs, partition(costs, ranks)) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


def test_partition_gives_the_longest_first_to_the_least_loaded_rank():
    assert partition([5, 9, 4, 6, 6], 2) == [[0, 1], [2, 3, 4]]


def test_partition_refuses_zero_ranks():
    with pytest.raises(ValueError, match=r"^ranks is 0; allowed: >= 1$"):
        partition([1], 0)


@given(lengths_of, st.randoms(use_true_random=False))
def test_row_lengths_do_not_depend_on_the_order_of_the_sequences(lengths, random):
    shuffled = random.sample(lengths, len(lengths))
    for make in (pack, pack_balanced):
        found = [sorted(sum(each[i] for i in row) for row in make(each, BUDGET)) for each in (lengths, shuffled)]
        assert found[0] == found[1]


def test_nothing_packs_into_nothing():
    assert pack([], 10) == pack_balanced([], 10) == []
    assert partition([], 2) == [[], []]
