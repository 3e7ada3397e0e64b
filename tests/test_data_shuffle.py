"""The shuffle is a bijection that depends on its key and needs no memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniapl.data.shuffle import permutation


@given(n=st.integers(1, 3000), seed=st.integers())
def test_every_index_comes_exactly_once(n: int, seed: int) -> None:
    shuffle = permutation(n, seed, "prompts", 0)
    assert sorted(map(shuffle, range(n))) == list(range(n))


def test_the_same_key_gives_the_same_order_and_another_key_another() -> None:
    first, again, epoch, seed, stream = (
        [permutation(1000, *key)(i) for i in range(1000)]
        for key in [(0, "a", 0), (0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0)]
    )
    assert first == again
    for other in (epoch, seed, stream):
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 10


def test_the_order_is_pinned() -> None:
    """A saved cursor means the same rows in every later version."""
    assert [permutation(10, 0, "prompts", 0)(i) for i in range(10)] == [8, 1, 3, 7, 6, 2, 4, 9, 0, 5]


def test_neighbours_are_spread_and_places_are_even() -> None:
    """Over keys, each place of a small shuffle gets each item about equally often (chi-square, 81 degrees)."""
    counts = [[0] * 10 for _ in range(10)]
    for key in range(2000):
        shuffle = permutation(10, key)
        for place in range(10):
            counts[place][shuffle(place)] += 1
    chi_square = sum((n - 200) ** 2 / 200 for line in counts for n in line)
    assert chi_square < 130


def test_a_billion_rows_cost_as_little_as_a_thousand() -> None:
    shuffle = permutation(10**9, 3)
    seen = {shuffle(i) for i in range(10_000)}
    assert len(seen) == 10_000
    assert max(seen) > 0.99e9


@pytest.mark.parametrize("n", [0, -1])
def test_nothing_to_shuffle(n: int) -> None:
    with pytest.raises(ValueError, match="allowed: > 0"):
        permutation(n)


def test_an_index_outside_is_refused() -> None:
    with pytest.raises(IndexError, match="allowed: 0 to 4"):
        permutation(5)(5)
