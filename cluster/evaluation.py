"""Held-out evaluation through the running system: sampled by the engines, scored, weighed by the learner."""

from __future__ import annotations

from cluster.system import System
from uniapl.analysis import EvaluatedSample, Evaluation
from uniapl.data.encoding import ChatEncoder
from uniapl.objective.sequences import TrainingSequence
from uniapl.records import Group, Prompt, Sample


def evaluate(system: System, prompts: list[Prompt], step: int) -> Evaluation:
    """Sample and score `prompts`, and take log-probabilities of samples and expert responses.

    Args:
        system: with engines.
        prompts: held-out ones.
        step: optimizer steps made so far.
    """
    e = system.config.evaluation
    groups = system.evaluate(prompts, e.samples, e.temperature)
    encoder = ChatEncoder.from_folder(system.config.model.path)
    sequences: list[TrainingSequence] = []
    for group in groups:  # samples and expert of one prompt side by side: the learner computes the prompt once
        sequences += [_sequence(group.prompt, sample.token_ids) for sample in group.samples]
        if group.prompt.expert_response is not None:
            sequences.append(_sequence(group.prompt, encoder.response_ids(group.prompt.expert_response)))
    rows = iter(zip(sequences, system.learner.logprobs(sequences), strict=True))
    found = Evaluation(step=step, samples=[], expert_lengths=[], expert_token_logprobs=[])
    for group in groups:
        found.samples.extend(_evaluated(group, sample, next(rows)[1]) for sample in group.samples)
        if group.prompt.expert_response is not None:
            expert, logprobs = next(rows)
            found.expert_lengths.append(len(expert.response_ids))
            found.expert_token_logprobs.extend(logprobs)
    return found


def _sequence(prompt: Prompt, response_ids: list[int]) -> TrainingSequence:
    return TrainingSequence(prompt.id, prompt.token_ids, response_ids, temperature=1.0)


def _evaluated(group: Group, sample: Sample, logprobs: list[float]) -> EvaluatedSample:
    score = sample.score
    return EvaluatedSample(
        prompt_id=group.prompt.id,
        prompt=group.prompt.messages[-1]["content"],
        response=sample.text,
        tokens=len(sample.token_ids),
        reward=score.reward if score else None,
        checks=score.checks if score else {},
        expert_response=group.prompt.expert_response,
        token_logprobs=logprobs,
    )
