"""What of a batch goes to which learner rank."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from uniapl.records import Demonstration, Group, Prompt
from uniapl.shares import share_out


def group(lease: int, prompt: list[int]) -> Group:
    return Group(lease, Prompt(f"p{lease}", [], prompt), [], "a")


prompts = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=2), max_size=8)


@given(prompts, prompts, st.integers(1, 4))
def test_everything_goes_to_one_rank_and_a_demonstration_to_that_of_its_prompt(
    sampled: list[list[int]], shown: list[list[int]], ranks: int
) -> None:
    groups = [group(i, prompt) for i, prompt in enumerate(sampled)]
    demonstrations = [Demonstration(str(i), prompt, [7] * (1 + i)) for i, prompt in enumerate(shown)]
    shares = share_out(groups, [10] * len(groups), demonstrations, ranks)
    assert len(shares) == ranks
    assert sorted(g.lease_id for mine, _ in shares for g in mine) == list(range(len(groups)))
    assert sorted(int(d.id) for _, mine in shares for d in mine) == list(range(len(demonstrations)))
    for mine, with_them in shares:
        here = [g.prompt.token_ids for g in mine]
        assert all(d.prompt_ids in here for d in with_them if d.prompt_ids in sampled)


def test_ranks_have_about_as_many_tokens_and_a_shared_prompt_counts_once() -> None:
    groups = [group(0, [1, 2, 3]), group(1, [4])]
    demonstrations = [Demonstration("of 0", [1, 2, 3], [9]), Demonstration("of none", [5, 6, 7], [9, 9])]
    shares = share_out(groups, [10, 6], demonstrations, 2)
    assert [([g.lease_id for g in mine], [d.id for d in shown]) for mine, shown in shares] == [
        ([0], ["of 0"]),
        ([1], ["of none"]),
    ]
