"""Groups on their way: packed for the queue, written out for a checkpoint."""

import dataclasses
import json

import pytest
from helpers_mixing import prompt
from helpers_queue import make_group

from actors.packed import PackedGroup, has_equal_rewards
from actors.queue import group_from_dict


class Nobody:
    id, actor, prompt = 3, "a", prompt("0")


@pytest.mark.parametrize(
    ("rewards", "equal"), [((0.5, 0.5), True), ((0.5, 0.25), False), ((0.0, None), False), ((None, None), False)]
)
def test_rewards_are_equal_only_where_all_samples_are_scored_alike(rewards, equal):
    assert has_equal_rewards(make_group(Nobody, rewards=rewards)) is equal


def test_a_group_without_scores_has_no_equal_rewards():
    group = make_group(Nobody)
    for sample in group.samples:
        sample.score = None
    assert not has_equal_rewards(group)


def test_a_group_written_out_reads_back_the_same():
    group = make_group(Nobody, version=2)
    group.samples[0].score = None
    packed = json.loads(json.dumps(dataclasses.asdict(group)))
    assert group_from_dict(packed) == group


def test_a_packed_group_opens_as_the_same_and_says_what_the_queue_asks():
    group = make_group(Nobody, version=2, rewards=(0.5, 0.5))
    packed = PackedGroup.of(group)
    assert packed.group() == group
    assert (packed.lease_id, packed.prompt_id, packed.actor, packed.samples) == (3, "0", "a", 2)
    assert (packed.oldest_version, packed.tokens, packed.unscored, packed.equal_rewards) == (2, 10, [], True)
