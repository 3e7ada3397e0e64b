"""Memory for buckets of weights is used again, never while a tensor still refers to it."""

from __future__ import annotations

from uniapl.memory import Memory


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
