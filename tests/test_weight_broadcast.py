"""Engine and learner agree: real vLLM, real ZeRO-3 on two ranks, real broadcasts."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cli import assert_memory_freed, shared_memory

from cluster.self_check import SelfCheckError, check_weight_round_trip, compare_after_training
from uniapl.config import Config
from uniapl.objective.sequences import TrainingSequence
from uniapl.records import Demonstration

TIMEOUT_S = 60.0
ONLY_DEMONSTRATIONS = {"preference": 0.0, "demonstration": 1.0, "adversarial": 0.0, "kl": 0.0}


def config_for(model: Path, **rollout: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"train": ["unused"], "max_prompt_tokens": 64, "max_response_tokens": 64},
            "rollout": {"dtype": "float32", "max_model_len": 256, "threads": 1, "actors": 2} | rollout,
            "objective": {"preference": {"weight": 0.0}, "demonstration": {"weight": 1.0}},
            "learner": {"ranks": 2, "dtype": "float32", "learning_rate": 0.01, "warmup_steps": 0, "row_tokens": 256},
            "evaluation": {"prompts": 0},
            "cluster": {"broadcast_timeout_s": TIMEOUT_S},
        }
    )


@pytest.fixture(scope="module")
def system(ray_session: Any, tiny: Path) -> Iterator[tuple[Any, list[Any]]]:
    """Two engines and two learner ranks on the tiny model, connected."""
    from helpers_mortal import MortalRolloutActor

    from cluster.placement import Site, learner_options, rollout_options
    from learner.group import LearnerGroup

    config = config_for(tiny)
    actor = ray_session.remote(MortalRolloutActor)
    engines = [actor.options(**rollout_options(config, Site())).remote(f"rollout-{i}", config, False) for i in range(2)]
    learner = LearnerGroup(config, learner_options(config, Site()))
    ray_session.get(learner.start() + [e.start.remote() for e in engines])
    learner.connect(engines)
    yield learner, engines
    stops = [e.shutdown.remote() for e in engines]
    ray_session.wait(stops, num_returns=len(stops), timeout=30)  # one of them is dead by then


def sampled(ray: Any, engine: Any, tokens: int = 12) -> Any:
    """At temperature 1: the log-probabilities of tokens of all ranks are compared, not of the likeliest alone."""
    return ray.get(engine.generate.remote([5, 6, 7, 8], n=2, temperature=1.0, max_tokens=tokens, seed=3))


def greedy(ray: Any, engine: Any) -> Any:
    return ray.get(engine.generate.remote([5, 6, 7, 8], n=1, temperature=0.0, max_tokens=12, seed=3))


def disagreement(learner: Any, samples: Any) -> float:
    """Largest difference between the engine's and the learner's log-probabilities."""
    sequences = [TrainingSequence(str(i), [5, 6, 7, 8], s.token_ids, 1.0) for i, s in enumerate(samples)]
    ours = learner.logprobs(sequences)
    return max(abs(a - b) for s, row in zip(samples, ours, strict=True) for a, b in zip(s.logprobs, row, strict=True))


def test_engine_and_learner_agree_before_training(ray_session: Any, system: Any) -> None:
    learner, engines = system
    assert disagreement(learner, sampled(ray_session, engines[0])) <= 1e-4


def test_log_lines_of_engines_and_ranks_say_where_they_come_from(ray_session: Any, system: Any, tmp_path: Path) -> None:
    def warn(actor: Any) -> None:
        logging.getLogger("own").warning("here")

    learner, engines = system
    actors = (engines[1], learner.ranks[1])
    ray_session.get([actor.__ray_call__.remote(warn) for actor in actors])
    learner.save(tmp_path)
    learner.step(6, [], [], [Demonstration("d", [5, 6, 7, 8], [40, 41, 42])], ONLY_DEMONSTRATIONS)
    learner.load(tmp_path)
    learner.broadcast(8)
    ray_session.get([actor.__ray_call__.remote(warn) for actor in actors])
    logs, deadline = Path(ray_session._private.worker._global_node.get_logs_dir_path()), time.monotonic() + 20
    steps = {"rollout-1": ("-", "9"), "learner-1": ("-", "7")}  # with version 8 an engine works for the ninth
    expected = {f"WARNING run=run step={step} actor={name} own: here" for name in steps for step in steps[name]}
    while missing := expected - {
        line.split(" ", 2)[-1] for path in logs.glob("worker-*.err") for line in path.read_text().splitlines()
    }:
        assert time.monotonic() < deadline, missing
        time.sleep(0.2)


def test_running_responses_go_on_with_the_new_weights(ray_session: Any, system: Any, tmp_path: Path) -> None:
    """`rollout.update_mode: keep`: every span of a response has the log-probabilities of its own weights.

    Before the model is taught to be brief, below.
    """
    learner, engines = system
    learner.broadcast(10)
    learner.save(tmp_path)
    learner.step(4, [], [], [Demonstration("d", [5, 6, 7, 8], [40, 41, 42])], ONLY_DEMONSTRATIONS)
    # Enough of them that the engine is busy for seconds, while the broadcast begins at once.
    running = [engines[0].generate.remote([5, 6, 7, 8], 8, 1.0, 240, seed) for seed in range(8)]
    time.sleep(0.2)
    learner.broadcast(11)
    samples = [sample for group in ray_session.get(running) for sample in group]
    assert {span.version for sample in samples for span in sample.versions} == {10, 11}
    sequences = [TrainingSequence(str(i), [5, 6, 7, 8], s.token_ids, 1.0) for i, s in enumerate(samples)]
    newer = learner.logprobs(sequences)
    learner.load(tmp_path)
    older = learner.logprobs(sequences)
    for sample, new, old in zip(samples, newer, older, strict=True):
        for span in sample.versions:
            expected = (new if span.version == 11 else old)[span.start : span.end]
            assert sample.logprobs[span.start : span.end] == pytest.approx(expected, abs=1e-3)
    assert max(abs(a - b) for new, old in zip(newer, older, strict=True) for a, b in zip(new, old, strict=True)) > 0.01


def test_after_a_broadcast_every_engine_has_the_learners_weights_and_version(
    ray_session: Any, system: Any, tiny: Path
) -> None:
    learner, engines = system
    pieces = Pieces(config_for(tiny), learner, engines)
    before = sampled(ray_session, engines[0])
    demonstrations = [Demonstration(str(i), [5, 6, 7, 8], [20 + i, 30, 31, 2]) for i in range(5)]
    for step in range(3):
        learner.step(step, [], [], demonstrations, ONLY_DEMONSTRATIONS)
    assert disagreement(learner, before) > 0.1, "training must have moved the learner"
    differ = (
        r"2 engines and the learner DIFFER \(more than 1e-05 in float32\): KL .* not one of the model that is written"
    )
    with pytest.warns(UserWarning, match=differ):
        compare_after_training(pieces)
    sent = learner.broadcast(3)
    assert " engines and the learner agree: KL " in compare_after_training(pieces)
    assert sent.metrics["broadcast/bytes"] > 100_000
    for engine in engines:
        after = sampled(ray_session, engine) + greedy(ray_session, engine)
        assert disagreement(learner, after) <= 1e-4
        assert {span.version for sample in after for span in sample.versions} == {3}


@dataclass
class Pieces:
    """What the self-check uses of a running system: the real learner and engines.

    `publish` and what the learner broadcasts may be left out, as a broken transfer would: no real fault
    leaves the transfer's acknowledgements right and its weights wrong.
    """

    config: Config
    learner: Any
    handles: list[Any]
    publishes: bool = True

    @property
    def engines(self) -> dict[str, Any]:
        return {f"rollout-{place}": handle for place, handle in enumerate(self.handles)}

    def send(self, version: int, vector_scale: float = 1.0) -> None:
        self.learner.broadcast(version, vector_scale)

    def publish(self, version: int) -> None:
        if self.publishes:
            self.send(version)


@dataclass
class SilentLearner:
    """The real learner, but what it broadcasts never arrives."""

    learner: Any

    def broadcast(self, version: int, vector_scale: float = 1.0) -> None:
        return

    def logprobs(self, sequences: list[TrainingSequence]) -> list[list[float]]:
        return self.learner.logprobs(sequences)


class TestSelfCheck:
    def test_passes_and_leaves_the_true_weights(self, ray_session: Any, system: Any, tiny: Path) -> None:
        learner, engines = system
        assert "agree" in check_weight_round_trip(Pieces(config_for(tiny), learner, engines), 7)
        assert disagreement(learner, sampled(ray_session, engines[0])) <= 1e-4

    def test_stops_when_new_weights_never_arrive(self, system: Any, tiny: Path) -> None:
        learner, engines = system
        with pytest.raises(SelfCheckError, match="rollout-0: other weights were sent and its output did not change"):
            check_weight_round_trip(Pieces(config_for(tiny), SilentLearner(learner), engines), 8)

    def test_stops_when_engine_and_learner_hold_different_weights(self, system: Any, tiny: Path) -> None:
        learner, engines = system
        with pytest.raises(SelfCheckError, match=r"rollout-0: KL between engine and learner is .*; allowed: <= 1e-05"):
            check_weight_round_trip(Pieces(config_for(tiny), learner, engines, publishes=False), 9)


def test_an_engine_that_slept_in_the_learners_turn_takes_new_weights(ray_session: Any, system: Any) -> None:
    """`rollout.colocate`, but for the memory, which vLLM frees on GPUs alone."""
    learner, engines = system
    ray_session.get([engine.sleep.remote() for engine in engines])
    waiting = engines[0].generate.remote([5, 6, 7, 8], n=1, temperature=1.0, max_tokens=4, seed=3)
    learner.step(0, [], [], [Demonstration("d", [5, 6, 7, 8], [60, 61, 62])], ONLY_DEMONSTRATIONS)
    assert ray_session.wait([waiting], timeout=0.5)[0] == [], "a sleeping engine generates nothing"
    ray_session.get([engine.wake_up.remote() for engine in engines])
    assert learner.broadcast(10).lost == {}
    assert len(ray_session.get(waiting)[0].token_ids) > 0
    assert disagreement(learner, greedy(ray_session, engines[0])) <= 1e-4


def test_bfloat16_goes_over_the_wire_and_into_the_engine(ray_session: Any, system: Any) -> None:
    """The ranks of this module are told another `rollout.dtype` for one broadcast: others would take half a minute."""
    learner, engines = system
    whole = learner.broadcast(17).metrics["broadcast/bytes"]
    exact = disagreement(learner, greedy(ray_session, engines[0]))
    send_as(ray_session, learner, torch.bfloat16)
    try:
        sent = learner.broadcast(18)
    finally:
        send_as(ray_session, learner, torch.float32)
    assert sent.lost == {} and whole / 2 <= sent.metrics["broadcast/bytes"] < 0.51 * whole, "checksums do not shrink"
    samples = greedy(ray_session, engines[0])
    assert exact < disagreement(learner, samples) < 0.05, "rounded, and no other weights"
    assert {span.version for sample in samples for span in sample.versions} == {18}


def send_as(ray: Any, learner: Any, dtype: torch.dtype) -> None:
    def put(rank: Any) -> None:
        rank._rank._sender._source._dtype = dtype

    ray.get([rank.__ray_call__.remote(put) for rank in learner.ranks])


def test_an_engine_killed_while_it_receives_is_cut_off_and_the_other_gets_the_weights(
    ray_session: Any, system: Any, tiny: Path
) -> None:
    """Last of this module: one engine of two is lost."""
    learner, engines = system
    before = sampled(ray_session, engines[0])
    learner.step(0, [], [], [Demonstration("d", [5, 6, 7, 8], [50, 51, 52])], ONLY_DEMONSTRATIONS)
    assert disagreement(learner, before) > 0.01, "training must have moved the learner"
    assert ray_session.get(engines[1].die_when_receiving.remote()) == [True]
    began = time.monotonic()
    sent = learner.broadcast(20)
    assert time.monotonic() - began < 2 * TIMEOUT_S
    assert sent.lost == {1: "did not receive weights: rollout-1: the engine's process died"}
    assert sent.metrics["broadcast/attempts"] == 2
    after = sampled(ray_session, engines[0])
    assert disagreement(learner, after) <= 1e-4
    assert {span.version for sample in after for span in sample.versions} == {20}
    ray_session.kill(engines[1])
    assert learner.connect(engines[:1]).lost == {}
    told = compare_after_training(Pieces(config_for(tiny), learner, engines))
    assert told.startswith("after the last broadcast 1 engine and the learner agree: KL ")
    assert told.endswith("; rollout-1 gave no answer")
    assert learner.broadcast(21).lost == {}
    assert disagreement(learner, sampled(ray_session, engines[0])) <= 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's sleep frees memory on GPUs alone")
def test_on_one_gpu_engine_and_learner_take_turns(ray_session: Any, tiny: Path) -> None:
    from actors.rollout import RolloutActor
    from cluster.placement import Site, learner_group, learner_options, rollout_options
    from learner.group import LearnerGroup

    config = config_for(tiny, actors=1)
    one = config.learner.model_copy(update={"ranks": 1})
    turns = config.rollout.model_copy(update={"colocate": True, "gpu_memory_utilization": 0.3})
    config, site = config.model_copy(update={"learner": one, "rollout": turns}), Site(gpu=True)
    group = learner_group(config, site)
    learner = LearnerGroup(config, learner_options(config, site, group))
    ray_session.get(learner.start())
    engine = (
        ray_session.remote(RolloutActor).options(**rollout_options(config, site, group)).remote("gpu", config, True)
    )
    ray_session.get(engine.start.remote())
    assert learner.connect([engine]).lost == {}
    free = torch.cuda.mem_get_info()[0]
    ray_session.get(engine.sleep.remote())
    assert torch.cuda.mem_get_info()[0] > free + 0.1 * torch.cuda.mem_get_info()[1]
    learner.step(0, [], [], [Demonstration("d", [5, 6, 7, 8], [40, 41, 42])], ONLY_DEMONSTRATIONS)
    ray_session.get(engine.wake_up.remote())
    assert learner.broadcast(1).lost == {}
    assert disagreement(learner, greedy(ray_session, engine)) <= 1e-3
    ray_session.get(engine.shutdown.remote())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl needs two GPUs: the learner's and the engine's")
def test_on_gpus_the_engine_gets_the_weights_over_nccl(ray_session: Any, tiny: Path) -> None:
    from actors.rollout import RolloutActor
    from cluster.placement import Site, learner_options, rollout_options
    from learner.group import LearnerGroup

    config = config_for(tiny, actors=1)
    engine = (
        ray_session.remote(RolloutActor).options(**rollout_options(config, Site(gpu=True))).remote("gpu", config, True)
    )
    learner = LearnerGroup(
        config.model_copy(update={"learner": config.learner.model_copy(update={"ranks": 1})}),
        learner_options(config, Site(gpu=True)),
    )
    ray_session.get([*learner.start(), engine.start.remote()])
    assert learner.connect([engine]).lost == {}
    before = sampled(ray_session, engine)
    learner.step(0, [], [], [Demonstration("d", [5, 6, 7, 8], [40, 41, 42])], ONLY_DEMONSTRATIONS)
    assert disagreement(learner, before) > 0.01, "training must have moved the learner"
    sent = learner.broadcast(1)
    assert sent.lost == {}
    assert sent.metrics["broadcast/bytes"] > 100_000
    assert disagreement(learner, sampled(ray_session, engine)) <= 1e-3
    ray_session.get(engine.shutdown.remote())


def test_an_engine_of_two_workers_gets_the_learners_weights(ray_session: Any, tiny: Path) -> None:
    """`rollout.tensor_parallel: 2`: each worker receives whole weights over the wire, and keeps its half."""
    from actors.rollout import RolloutActor
    from cluster.placement import Site, learner_options, rollout_options
    from learner.group import LearnerGroup

    before, config = shared_memory(), config_for(tiny, tensor_parallel=2, actors=1)
    config = Config.model_validate(config.model_dump() | {"learner": config.learner.model_dump() | {"ranks": 1}})
    actor = ray_session.remote(RolloutActor)
    engine = actor.options(**rollout_options(config, Site())).remote("rollout-0", config, False)
    learner = LearnerGroup(config, learner_options(config, Site()))
    try:
        ray_session.get([*learner.start(), engine.start.remote()])
        assert learner.connect([engine]).lost == {}
        assert disagreement(learner, sampled(ray_session, engine)) <= 1e-4
        learner.step(0, [], [], [Demonstration("d", [5, 6, 7, 8], [40, 41, 42])], ONLY_DEMONSTRATIONS)
        assert disagreement(learner, sampled(ray_session, engine)) > 0.1, "the engine still has the old weights"
        sent = learner.broadcast(1)
        assert sent.lost == {} and sent.metrics["broadcast/engines"] == 1.0
        assert disagreement(learner, sampled(ray_session, engine)) <= 1e-4
        ray_session.get(engine.shutdown.remote())
    finally:
        for part in (engine, *learner.ranks):
            ray_session.kill(part)
    assert_memory_freed(before)
