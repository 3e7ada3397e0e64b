"""Engine and learner agree: real vLLM, real ZeRO-3 on two ranks, real broadcasts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from uniapl.config import Config
from uniapl.objective.sequences import TrainingSequence
from uniapl.records import Demonstration


def config_for(model: Path, **rollout: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"train": ["unused"], "max_prompt_tokens": 64, "max_response_tokens": 64},
            "rollout": {"dtype": "float32", "max_model_len": 256, "threads": 1, "actors": 2} | rollout,
            "objective": {"preference": {"weight": 0.0}, "demonstration": {"weight": 1.0}},
            "learner": {"ranks": 2, "dtype": "float32", "learning_rate": 0.01, "warmup_steps": 0, "row_tokens": 128},
            "evaluation": {"prompts": 0},
            "cluster": {"broadcast_timeout_s": 60},
        }
    )


@pytest.fixture(scope="module")
def system(ray_session: Any, tiny: Path) -> Iterator[tuple[Any, list[Any]]]:
    """Two engines and two learner ranks on the tiny model, connected."""
    from actors.rollout import RolloutActor
    from cluster.placement import learner_options, rollout_options
    from learner.group import LearnerGroup

    config = config_for(tiny)
    actor = ray_session.remote(RolloutActor)
    engines = [
        actor.options(**rollout_options(config, gpu=False)).remote(f"rollout-{i}", config, False) for i in range(2)
    ]
    learner = LearnerGroup(config, learner_options(gpu=False))
    ray_session.get(learner.start() + [e.start.remote() for e in engines])
    learner.connect(engines)
    yield learner, engines
    ray_session.get([e.shutdown.remote() for e in engines])


def greedy(ray: Any, engine: Any, tokens: int = 12) -> Any:
    return ray.get(engine.generate.remote([5, 6, 7, 8], n=2, temperature=1.0, max_tokens=tokens, seed=3))


def disagreement(learner: Any, samples: Any) -> float:
    """Largest difference between the engine's and the learner's log-probabilities."""
    sequences = [TrainingSequence(str(i), [5, 6, 7, 8], s.token_ids, 1.0) for i, s in enumerate(samples)]
    ours = learner.logprobs(sequences)
    return max(abs(a - b) for s, row in zip(samples, ours, strict=True) for a, b in zip(s.logprobs, row, strict=True))


def test_engine_and_learner_agree_before_training(ray_session: Any, system: Any) -> None:
    learner, engines = system
    assert disagreement(learner, greedy(ray_session, engines[0])) <= 1e-4


def test_after_a_broadcast_every_engine_has_the_learners_weights_and_version(ray_session: Any, system: Any) -> None:
    learner, engines = system
    before = greedy(ray_session, engines[0])
    demonstrations = [Demonstration(str(i), [5, 6, 7, 8], [20 + i, 30, 31, 2]) for i in range(5)]
    for step in range(3):
        learner.step(step, [], [], demonstrations)
    assert disagreement(learner, before) > 0.1, "training must have moved the learner"
    sent = learner.broadcast(3)
    assert sent["broadcast/bytes"] > 100_000
    for engine in engines:
        after = greedy(ray_session, engine)
        assert disagreement(learner, after) <= 1e-4
        assert {span.version for sample in after for span in sample.versions} == {3}
