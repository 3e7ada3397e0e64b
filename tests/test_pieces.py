"""Pieces of a bucket, and memory for buckets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from uniapl.pieces import JOINED_BYTES, PIECE_BYTES, Memory, Part, cut, length

SIZES = st.lists(
    st.one_of(
        st.integers(0, 64),
        st.integers(JOINED_BYTES - 2, JOINED_BYTES + 2),
        st.integers(PIECE_BYTES - 2, PIECE_BYTES + 2),
        st.integers(0, 3 * PIECE_BYTES),
    ),
    max_size=40,
)


@given(SIZES)
def test_pieces_are_the_bytes_of_the_bucket_in_order(sizes: list[int]) -> None:
    parts = [part for piece in cut(sizes) for part in piece]
    place = {number: sum(sizes[:number]) for number in range(len(sizes))}
    at = 0
    for part in parts:
        assert place[part.tensor] + part.start == at
        assert part.end <= sizes[part.tensor]
        at += part.end - part.start
    assert at == sum(sizes)


@given(SIZES)
def test_pieces_are_bounded_and_hold_several_tensors_only_where_all_are_small(sizes: list[int]) -> None:
    for piece in cut(sizes):
        assert 0 < length(piece) <= PIECE_BYTES
        whole_and_small = [part.start == 0 and part.end == sizes[part.tensor] < JOINED_BYTES for part in piece]
        assert len(piece) == 1 or all(whole_and_small)


def test_small_tensors_share_a_piece_and_large_ones_do_not() -> None:
    sizes = [10, 20, PIECE_BYTES + 1, 30]
    assert cut(sizes) == [
        [Part(0, 0, 10), Part(1, 0, 20)],
        [Part(2, 0, PIECE_BYTES)],
        [Part(2, PIECE_BYTES, PIECE_BYTES + 1)],
        [Part(3, 0, 30)],
    ]


def test_memory_is_used_again_when_no_tensor_refers_to_it() -> None:
    memory = Memory()
    first = memory.take(100)
    place, part = first.data_ptr(), first[10:20]
    del first
    other = memory.take(50)
    assert other.data_ptr() != place, "a part of it is still used"
    del part
    again = memory.take(80)
    assert (again.data_ptr(), again.numel()) == (place, 80)
    assert memory.take(101).numel() == 101
