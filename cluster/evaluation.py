"""Held-out evaluation through the running system: sampled by the engines, scored, compared by the learner."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cluster.heldout import Sampling
from cluster.system import System
from uniapl.analysis import EvaluatedSample, Evaluation
from uniapl.data.encoding import ChatEncoder
from uniapl.live import LiveTable
from uniapl.objective.sequences import TrainingSequence
from uniapl.records import Group, Prompt, Sample

SHARE = 4
"""An evaluation beside generation takes one in so many of an engine's places (`rollout.max_num_seqs`)."""
WAIT_S = 1.0


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
    found = Evaluation(step, samples=[], expert_lengths=[], expert_token_logprobs=[], versions=_versions(groups))
    for group in groups:
        found.samples.extend(_evaluated(group, sample, next(rows)[1]) for sample in group.samples)
        if group.prompt.expert_response is not None:
            expert, logprobs = next(rows)
            found.expert_lengths.append(len(expert.response_ids))
            found.expert_token_logprobs.extend(logprobs)
    return found


def evaluate_and_save(system: System, prompts: list[Prompt], step: int, path: Path, live: LiveTable) -> None:
    """`evaluate` into a file, which is named by when it is: before or after training; nothing without prompts."""
    if not prompts:
        return
    live.phase(f"evaluating on {len(prompts)} held-out prompts")
    found = evaluate(system, prompts, step)
    found.save(path)
    if (rate := found.pass_rate) is not None:
        interval = f"95 % interval {rate.low:.1%} to {rate.high:.1%}"
        live.note(f"held-out pass rate {path.stem} training: {rate.value:.1%} ({interval})")


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


def _versions(groups: list[Group]) -> list[int]:
    return sorted({span.version for group in groups for sample in group.samples for span in sample.versions})


class BesideTraining:
    """Evaluations every `evaluation.every` steps, by the engines that generate, while the learner trains.

    With `queue.max_staleness: 0` the engines have nothing to do between a batch and the publishing of its step: an
    evaluation begins there, alone in the engines, and `hold` keeps new weights from them until it is done. So all of
    it is of one version, and what is trained is the same as without it. Ahead of the learner, engines generate all the
    time: an evaluation takes a share of their places beside that, goes on over updates of the weights, and says which
    versions it is of.

    Args:
        system: with engines.
        prompts: held-out ones.
        folder: of the run, whose eval/ gets step-NNNNN.json.
        first: step that training goes on from: evaluations of it and of later ones are made again.
        note: called with a line for the user.
    """

    def __init__(
        self, system: System, prompts: list[Prompt], folder: Path, first: int, note: Callable[[str], None]
    ) -> None:
        self._system, self._prompts, self._folder, self._note = system, prompts, folder / "eval", note
        self._every = system.config.evaluation.every if prompts else 0
        self._synchronous = system.config.queue.max_staleness == 0
        self._step, self._began = 0, 0.0
        self._sampling: Sampling | None = None
        for path in self._folder.glob("step-*.json"):
            number = path.stem.removeprefix("step-")
            if number.isdigit() and int(number) >= first:
                path.unlink()

    def begin(self, step: int) -> None:
        """After `step` steps, when their weights are at the engines and the next batch is at the learner."""
        if not self._every or step == 0 or step % self._every:
            return
        if self._sampling is not None:
            self._note(f"no evaluation of step {step}: that of step {self._step} still goes on")
            return
        config = self._system.config
        e, places = config.evaluation, config.rollout.max_num_seqs
        at_once = 0 if self._synchronous else max(1, places // (SHARE * e.samples))
        self._step, self._began = step, time.monotonic()
        self._sampling = Sampling(self._system.fleet, config, self._prompts, e.samples, e.temperature, at_once)

    def hold(self) -> dict[str, float]:
        """Before new weights go to the engines; returns the seconds waited for, where evaluations can hold them up."""
        if not self._every or not self._synchronous:
            return {}
        began = time.monotonic()
        self._wait()
        return {"time/evaluate": time.monotonic() - began}

    def finish(self) -> None:
        """After the last step: wait for what still goes on, and write it."""
        if self._sampling is not None:
            self._wait()
            self.collect()

    def _wait(self) -> None:
        while self._sampling is not None and not self._sampling.poll():
            self._sampling.wait(WAIT_S)
            self._system.fleet.poll()
            if self._sampling.stuck:  # the next engine comes with the next weights
                self._note(f"no evaluation of step {self._step}: no engine is left that has its weights")
                self._sampling = None

    def collect(self) -> dict[str, float]:
        """Write an evaluation that is done; returns its metrics, empty where none is.

        `eval/step` is the step after which it was begun.
        """
        if self._sampling is None or not self._sampling.poll():
            return {}
        groups, self._sampling = self._sampling.groups, None
        samples = [_evaluated(group, sample, []) for group in groups for sample in group.samples]
        found = Evaluation(self._step, samples, [], [], _versions(groups))
        found.save(self._folder / f"step-{self._step:05d}.json")
        metrics = {"eval/step": float(self._step), "eval/s": time.monotonic() - self._began}
        metrics["eval/versions"] = float(len(found.versions))
        if (rate := found.pass_rate) is not None:
            metrics |= {"eval/pass_rate": rate.value, "eval/low": rate.low, "eval/high": rate.high}
            interval = f"95 % interval {rate.low:.1%} to {rate.high:.1%}"
            self._note(f"held-out pass rate after step {self._step}: {rate.value:.1%} ({interval})")
        return metrics
