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
    experts = [(p, encoder.response_ids(p.expert_response)) for p in prompts if p.expert_response is not None]
    samples = [(group, sample) for group in groups for sample in group.samples]
    sequences = [_sequence(group.prompt, sample.token_ids) for group, sample in samples]
    sequences += [_sequence(prompt, ids) for prompt, ids in experts]
    logprobs = system.learner.logprobs(sequences)
    return Evaluation(
        step=step,
        samples=[_evaluated(g, s, row) for (g, s), row in zip(samples, logprobs, strict=False)],
        expert_lengths=[len(ids) for _, ids in experts],
        expert_token_logprobs=[value for row in logprobs[len(samples) :] for value in row],
    )


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
