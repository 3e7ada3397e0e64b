"""The records that travel through the system, and the Arrow schemas they are stored in.

One item's life: a `Prompt` is leased to a rollout actor, which makes a `Group` of `Sample`s; the
queue puts groups and `Demonstration`s together as one `MixedBatch` for the learner.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

import pyarrow as pa

MESSAGE = pa.struct([pa.field("role", pa.string(), False), pa.field("content", pa.string(), False)])

# A row of a data shard. `response` is the expert's, null where there is none. `verifier` is what the
# reward functions need to judge a response, as JSON text; what it means is theirs to know.
SHARD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("messages", pa.list_(MESSAGE), nullable=False),
        pa.field("response", pa.string()),
        pa.field("verifier", pa.string()),
    ]
)

# A row of a comparisons file: two responses to one prompt, of which somebody preferred the first.
COMPARISON_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("messages", pa.list_(MESSAGE), nullable=False),
        pa.field("chosen", pa.string(), nullable=False),
        pa.field("rejected", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Prompt:
    """One row of a shard, tokenized: what a rollout actor needs to make and judge a group."""

    id: str
    messages: list[dict[str, str]]
    token_ids: list[int]
    """The chat template applied, up to where the assistant's answer begins."""
    verifier: str | None = None
    expert_response: str | None = None
    expert_ids: list[int] | None = None
    """Token ids of the expert's response with the end-of-turn token, as long as a demonstration may be."""


@dataclass(frozen=True)
class Demonstration:
    """An expert's answer to a prompt, as token ids that end with the end-of-turn token."""

    id: str
    prompt_ids: list[int]
    response_ids: list[int]


@dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, end) of a sample were drawn from weights `version`."""

    start: int
    end: int
    version: int


@dataclass
class Score:
    """What the reward service says of one response.

    A response that could not be scored has `reward=None` and the reason; it never counts as 0.
    """

    reward: float | None
    unscored: str | None = None
    checks: dict[str, bool] = field(default_factory=dict)
    """Outcome per named check, such as `change_case:english_lowercase`."""
    expert_score: float | None = None
    """s_i of the discriminator; None where there is no discriminator or no expert response."""
    expert_reference: float | None = None
    """What the discriminator gives the expert's own response to the same prompt."""


@dataclass
class Sample:
    """One response of a group. `token_ids`, `logprobs`: [tokens]; logprobs are the sampler's own."""

    token_ids: list[int]
    logprobs: list[float]
    versions: list[VersionSpan]
    text: str
    finish_reason: str
    score: Score | None = None

    @property
    def oldest_version(self) -> int:
        return min(span.version for span in self.versions)


@dataclass
class Group:
    """The samples of one prompt, made under one lease."""

    lease_id: int
    prompt: Prompt
    samples: list[Sample]
    actor: str
    generate_s: float = 0.0
    score_s: float = 0.0

    @property
    def oldest_version(self) -> int:
        return min(sample.oldest_version for sample in self.samples)

    @property
    def unscored(self) -> list[str]:
        """Why samples of this group could not be scored; empty when all were."""
        scores = [sample.score for sample in self.samples]
        return [(s and s.unscored) or "not scored" for s in scores if s is None or s.reward is None]

    @property
    def tokens(self) -> int:
        """Prompt and response tokens of all samples: what the group costs the learner unshared."""
        return sum(len(self.prompt.token_ids) + len(s.token_ids) for s in self.samples)


@dataclass(frozen=True)
class MixedBatch:
    """What one optimizer step consumes."""

    step: int
    """Optimizer steps made before this one; equals the version of the weights it updates."""
    groups: list[Group]
    demonstrations: list[Demonstration]


def expert_scores(groups: list[Group]) -> dict[int, list[tuple[float | None, float | None]]]:
    """`expert_score` and `expert_reference` of every sample of scored groups, by lease id."""
    return {g.lease_id: [(s.expert_score, s.expert_reference) for s in _scores(g)] for g in groups}


def put_expert_scores(groups: list[Group], found: dict[int, list[tuple[float | None, float | None]]]) -> None:
    """Give another copy of the same groups the scores that `expert_scores` took from the first.

    Raises:
        KeyError: a group that is not among them.
    """
    for group in groups:
        for score, (own, reference) in zip(_scores(group), found[group.lease_id], strict=True):
            score.expert_score, score.expert_reference = own, reference


def _scores(group: Group) -> list[Score]:
    return [sample.score for sample in group.samples if sample.score is not None]


# A consumed batch as kept in runs/<name>/batches/, one row per sample or demonstration.
BATCH_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("kind", pa.string()),
        ("prompt_id", pa.string()),
        ("lease_id", pa.int64()),
        ("actor", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("expert_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("versions", pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32()), ("version", pa.int32())]))),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("reward", pa.float64()),
        ("expert_score", pa.float64()),
        ("expert_reference", pa.float64()),
        ("checks", pa.string()),
    ]
)


def batch_table(batch: MixedBatch) -> pa.Table:
    """A consumed batch as a table of `BATCH_SCHEMA`, samples first, in the batch's order."""
    rows = [_sample_row(batch.step, group, sample) for group in batch.groups for sample in group.samples]
    rows += [_demonstration_row(batch.step, demonstration) for demonstration in batch.demonstrations]
    return pa.Table.from_pylist(rows, schema=BATCH_SCHEMA)


def _sample_row(step: int, group: Group, sample: Sample) -> dict[str, object]:
    score = sample.score or Score(reward=None)
    return {
        "step": step,
        "kind": "sample",
        "prompt_id": group.prompt.id,
        "lease_id": group.lease_id,
        "actor": group.actor,
        "prompt_ids": group.prompt.token_ids,
        "expert_ids": group.prompt.expert_ids,
        "response_ids": sample.token_ids,
        "logprobs": sample.logprobs,
        "versions": [dataclasses.asdict(span) for span in sample.versions],
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "reward": score.reward,
        "expert_score": score.expert_score,
        "expert_reference": score.expert_reference,
        "checks": json.dumps(score.checks, sort_keys=True),
    }


def _demonstration_row(step: int, demonstration: Demonstration) -> dict[str, object]:
    return {
        "step": step,
        "kind": "demonstration",
        "prompt_id": demonstration.id,
        "prompt_ids": demonstration.prompt_ids,
        "response_ids": demonstration.response_ids,
    }
