"""What the objective wants of a batch: every sequence with its share of every term."""

from __future__ import annotations

from dataclasses import dataclass, field

from uniapl.objective.advantages import group_advantages
from uniapl.objective_config import ObjectiveConfig
from uniapl.records import Demonstration, Group, MixedBatch


@dataclass(frozen=True)
class TermShare:
    """How one sequence counts in one term."""

    token_weight: float
    """Of each of its response tokens in the term's sum."""
    count: float
    """What the sequence adds to the term's denominator."""
    advantage: float = 0.0


@dataclass(frozen=True)
class TrainingSequence:
    """A prompt with one response. Prompt tokens carry no loss; response tokens carry the terms' signals."""

    id: str
    prompt_ids: list[int]
    response_ids: list[int]
    temperature: float
    """The temperature the response was sampled at; 1 for demonstrations."""
    behaviour_logprobs: list[float] | None = None
    """[response tokens], as the engine that sampled reported them; None for demonstrations."""
    terms: dict[str, TermShare] = field(default_factory=dict)
    """By the term's name. A term that is absent does not count this sequence."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def sampled(self) -> bool:
        """Whether a rollout engine drew the response."""
        return self.behaviour_logprobs is not None


def training_sequences(
    batch: MixedBatch, objective: ObjectiveConfig, temperature: float, weights: dict[str, float], constant_length: int
) -> list[TrainingSequence]:
    """The sequences of a batch in order: every sample of every group, then the demonstrations.

    A term that is not active (`ObjectiveConfig.active`) asks for nothing. Left out are sequences that no term
    counts, and empty responses, which have no token; the group's advantages see their rewards all the same.

    Args:
        temperature: that the samples were drawn at.
        weights: of the terms in this step.
        constant_length: tokens that a sequence counts for with `average: constant` (Dr.GRPO): the most it can have.

    Raises:
        ValueError: a sample without a reward, where the preference term is active.
    """
    found = [s for group in batch.groups for s in _of_group(group, objective, temperature, weights, constant_length)]
    if objective.active("demonstration", weights):
        found += [_of_demonstration(d) for d in batch.demonstrations]
    return [s for s in found if s.terms]


def _of_demonstration(demonstration: Demonstration) -> TrainingSequence:
    d = demonstration
    terms = {"demonstration": _share("token", len(d.response_ids), 0)} if d.response_ids else {}
    return TrainingSequence(d.id, d.prompt_ids, d.response_ids, temperature=1.0, terms=terms)


def _of_group(
    group: Group, objective: ObjectiveConfig, temperature: float, weights: dict[str, float], constant_length: int
) -> list[TrainingSequence]:
    advantages = _advantages(group, objective, weights)
    averages = {
        "preference": objective.preference.average,
        "adversarial": objective.adversarial.average,
        "kl": objective.preference.average,
    }
    return [
        TrainingSequence(
            id=f"{group.prompt.id}/{index}",
            prompt_ids=group.prompt.token_ids,
            response_ids=sample.token_ids,
            temperature=temperature,
            behaviour_logprobs=sample.logprobs,
            terms={
                term: _share(averages[term], len(sample.token_ids), constant_length, values[index])
                for term, values in advantages.items()
                if sample.token_ids
            },
        )
        for index, sample in enumerate(group.samples)
    ]


def _share(average: str, length: int, constant_length: int, advantage: float = 0.0) -> TermShare:
    """The share that makes (sum of weight x token) / (sum of counts) the average asked for. `length` > 0."""
    if average == "sequence":
        return TermShare(1.0 / length, 1.0, advantage)
    return TermShare(1.0, float(constant_length if average == "constant" else length), advantage)


def _advantages(group: Group, objective: ObjectiveConfig, weights: dict[str, float]) -> dict[str, list[float]]:
    """Advantages [samples] of every active term that counts this group's samples."""
    found: dict[str, list[float]] = {}
    adversarial, scores = objective.adversarial, _expert_scores(group)
    if objective.active("preference", weights):
        rewards = [r for r in shaped_rewards(group, objective, weights) if r is not None]
        if len(rewards) < len(group.samples):
            raise ValueError(f"prompt {group.prompt.id}: a sample without a reward reached the objective")
        found["preference"] = group_advantages(rewards, objective.preference.advantage_std)
    if objective.active("adversarial", weights) and not adversarial.as_reward and scores is not None:
        found["adversarial"] = group_advantages(scores, adversarial.advantage_std)
    if objective.active("kl", weights):
        found["kl"] = [0.0] * len(group.samples)
    return found


def shaped_rewards(group: Group, objective: ObjectiveConfig, weights: dict[str, float]) -> list[float | None]:
    """What the preference term compares, [samples]: the rewards, with `as_reward` plus lambda x expert score.

    A group in which a sample has no expert score is compared by reward alone. None: a sample without a reward.
    """
    rewards = [sample.score.reward if sample.score else None for sample in group.samples]
    scores = _expert_scores(group) if objective.adversarial.as_reward and weights["adversarial"] else None
    if scores is None:
        return rewards
    return [None if r is None else r + weights["adversarial"] * s for r, s in zip(rewards, scores, strict=True)]


def _expert_scores(group: Group) -> list[float] | None:
    """[samples]; None where any sample has none."""
    scores = [s.score.expert_score for s in group.samples if s.score and s.score.expert_score is not None]
    return scores if len(scores) == len(group.samples) else None
