"""What the objective wants of a batch: every sequence with the signals of its response tokens."""

from __future__ import annotations

from dataclasses import dataclass

from uniapl.config import ObjectiveConfig
from uniapl.objective.advantages import group_advantages
from uniapl.records import Demonstration, Group, MixedBatch, Sample


@dataclass(frozen=True)
class TrainingSequence:
    """A prompt with one response. Prompt tokens carry no loss; response tokens carry these signals."""

    id: str
    prompt_ids: list[int]
    response_ids: list[int]
    temperature: float
    """The temperature the response was sampled at; 1 for demonstrations."""
    behaviour_logprobs: list[float] | None = None
    demonstration: bool = False
    preference_advantage: float | None = None
    adversarial_advantage: float | None = None
    """None: this sequence does not count in the term (no expert response to compare with)."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def training_sequences(batch: MixedBatch, objective: ObjectiveConfig, temperature: float) -> list[TrainingSequence]:
    """The sequences of a batch in order: every sample of every group, then the demonstrations.

    A term whose weight is 0 asks for nothing. Empty responses carry no token and are left out.

    Raises:
        ValueError: a sample without a reward.
    """
    found = [s for group in batch.groups for s in _of_group(group, objective, temperature)]
    if objective.demonstration.weight > 0:
        found += [_of_demonstration(d) for d in batch.demonstrations]
    return [s for s in found if s.response_ids]


def _of_demonstration(demonstration: Demonstration) -> TrainingSequence:
    d = demonstration
    return TrainingSequence(d.id, d.prompt_ids, d.response_ids, temperature=1.0, demonstration=True)


def _of_group(group: Group, objective: ObjectiveConfig, temperature: float) -> list[TrainingSequence]:
    preference = _preference_advantages(group, objective)
    adversarial = _adversarial_advantages(group, objective)
    return [
        TrainingSequence(
            id=f"{group.prompt.id}/{index}",
            prompt_ids=group.prompt.token_ids,
            response_ids=sample.token_ids,
            temperature=temperature,
            behaviour_logprobs=sample.logprobs,
            preference_advantage=preference[index],
            adversarial_advantage=adversarial[index],
        )
        for index, sample in enumerate(group.samples)
    ]


def _preference_advantages(group: Group, objective: ObjectiveConfig) -> list[float | None]:
    if objective.preference.weight == 0:
        return [None] * len(group.samples)
    rewards = [_reward(group, sample) for sample in group.samples]
    return list(group_advantages(rewards, objective.preference.advantage_std))


def _reward(group: Group, sample: Sample) -> float:
    if sample.score is None or sample.score.reward is None:
        raise ValueError(f"prompt {group.prompt.id}: a sample without a reward reached the objective")
    return sample.score.reward


def _adversarial_advantages(group: Group, objective: ObjectiveConfig) -> list[float | None]:
    """Group-normalised expert scores; None for a group that has no expert response."""
    scores = [s.score.expert_score if s.score else None for s in group.samples]
    known = [s for s in scores if s is not None]
    if objective.adversarial.weight == 0 or len(known) < len(scores):
        return [None] * len(group.samples)
    return list(group_advantages(known, divide_by_std=True))
