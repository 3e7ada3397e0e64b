"""Learning rate, batch metrics and the split of a step's time."""

from __future__ import annotations

import math

import pytest

from uniapl.config import LearnerConfig, ObjectiveConfig
from uniapl.metrics import batch_metrics, time_split
from uniapl.objective_config import TERMS
from uniapl.records import (
    BATCH_SCHEMA,
    Demonstration,
    Group,
    MixedBatch,
    Prompt,
    Sample,
    Score,
    VersionSpan,
    batch_table,
)
from uniapl.schedule import learning_rate

UNSHAPED = dict.fromkeys(TERMS, 0.0)


class TestLearningRate:
    config = LearnerConfig(learning_rate=1.0, warmup_steps=4, min_learning_rate_ratio=0.1)

    def test_rises_linearly_from_above_zero_to_the_peak(self) -> None:
        assert [learning_rate(s, 20, self.config) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]

    def test_falls_as_a_cosine_to_the_ratio_and_stays_there(self) -> None:
        assert learning_rate(12, 20, self.config) == pytest.approx(0.1 + 0.9 * 0.5)
        assert learning_rate(20, 20, self.config) == pytest.approx(0.1)
        assert learning_rate(99, 20, self.config) == pytest.approx(0.1)

    def test_without_warm_up_it_begins_at_the_peak(self) -> None:
        assert learning_rate(0, 5, LearnerConfig(learning_rate=3.0, warmup_steps=0)) == 3.0


def sample(reward: float, passed: bool, expert: float | None, spans: list[VersionSpan]) -> Sample:
    n = spans[-1].end
    reference = None if expert is None else 0.7
    score = Score(reward, checks={"a:b": passed}, expert_score=expert, expert_reference=reference)
    return Sample(list(range(n)), [-0.5] * n, spans, "text", "stop" if passed else "length", score)


def mixed() -> MixedBatch:
    old, new = VersionSpan(0, 2, 3), VersionSpan(2, 4, 5)
    groups = [
        Group(7, Prompt("p", [], [1]), [sample(1.0, True, 0.8, [old, new]), sample(0.0, False, 0.4, [old])], "a"),
        Group(8, Prompt("q", [], [1]), [sample(0.0, False, None, [old]), sample(0.0, False, None, [old])], "a"),
    ]
    return MixedBatch(5, groups, [Demonstration("d", [1], [2, 3, 4])])


def test_batch_metrics() -> None:
    m = batch_metrics(mixed(), ObjectiveConfig(), UNSHAPED)
    assert m["reward/mean"] == 0.25
    assert m["reward/std"] == pytest.approx(math.sqrt(0.1875))
    assert m["reward/pass_rate"] == m["check/a:b"] == 0.25
    assert m["reward/zero_advantage_groups"] == 0.5
    assert (m["staleness/mean"], m["staleness/max"]) == (pytest.approx(1.6), 2.0), "per token, not per group"
    assert [m[f"staleness/age_{age}"] for age in range(3)] == pytest.approx([0.2, 0.0, 0.8])
    assert (m["discriminator/sample_mean"], m["discriminator/expert_mean"]) == pytest.approx((0.6, 0.7))
    assert m["discriminator/gap"] == m["discriminator/margin"] == pytest.approx(0.1)
    assert m["discriminator/accuracy"] == m["discriminator/paired"] == 0.5
    assert (m["length/sample_mean"], m["length/demonstration_mean"]) == (2.5, 3.0)
    assert m["length/truncated"] == 0.75


def test_with_as_reward_a_group_counts_as_equal_where_reward_and_expert_score_are() -> None:
    batch, shaped = mixed(), ObjectiveConfig.model_validate({"adversarial": {"as_reward": True}})
    for group, scores in zip(batch.groups, ([0.0, 2.0], [0.3, 0.4]), strict=True):
        for s, score in zip(group.samples, scores, strict=True):
            assert s.score is not None
            s.score.expert_score = score
    found = [
        batch_metrics(batch, shaped, UNSHAPED | {"adversarial": weight})["reward/zero_advantage_groups"]
        for weight in (0.0, 0.25, 0.5)  # rewards 1 and 0 with scores 0 and 2 are equal at 0.5
    ]
    assert found == [0.5, 0.0, 0.5]


def test_a_batch_of_demonstrations_alone_has_no_reward_metrics() -> None:
    m = batch_metrics(MixedBatch(0, [], mixed().demonstrations), ObjectiveConfig(), UNSHAPED)
    assert m == {"length/demonstration_mean": 3.0}


def test_a_batch_is_kept_as_rows_with_everything_a_replay_needs() -> None:
    table = batch_table(mixed())
    assert table.schema == BATCH_SCHEMA
    rows = table.to_pylist()
    assert [r["kind"] for r in rows] == ["sample"] * 4 + ["demonstration"]
    assert rows[0]["versions"] == [{"start": 0, "end": 2, "version": 3}, {"start": 2, "end": 4, "version": 5}]
    assert (rows[0]["expert_score"], rows[0]["expert_reference"]) == (0.8, 0.7)
    assert (rows[0]["lease_id"], rows[0]["response_ids"], rows[0]["checks"]) == (7, [0, 1, 2, 3], '{"a:b": true}')
    assert rows[4]["response_ids"] == [2, 3, 4]


@pytest.mark.parametrize(
    ("waited", "groups", "expected"),
    [
        (10.0, [(8.0, 0.5), (7.0, 0.1)], (8.0, 0.5, 1.5)),
        (10.0, [(12.0, 1.0)], (9.0, 1.0, 0.0)),
        (0.2, [(5.0, 1.0)], (0.0, 0.2, 0.0)),
        (0.3, [], (0.0, 0.0, 0.3)),
    ],
)
def test_waiting_time_is_split_along_the_last_group(waited: float, groups: list, expected: tuple) -> None:
    split = time_split(waited, groups)
    assert tuple(split.values()) == pytest.approx(expected)
    assert sum(split.values()) == pytest.approx(waited)
