"""One rollout actor with a real engine and a real queue: stragglers, and running groups when new weights come."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers_mixing
import psutil
import pytest
import ray
from helpers_mixing import Counting, demonstration, prompt
from helpers_tiny import tiny_model

from actors.queue import start_queue
from actors.rollout import EngineDiedError, RolloutActor
from uniapl.config import Config
from uniapl.leases import MAX_ABORTS, NEW_WEIGHTS
from uniapl.records import Group, Score

for module in (helpers_mixing, sys.modules[__name__]):  # tests/ is not on the path of every worker of Ray
    ray.cloudpickle.register_pickle_by_value(module)

BRIEF, ENDLESS = 8, 3900
"""Tokens: an endless response takes the engine longer than any test waits."""
GROUP = 3
WAIT_S = 60.0


def config_for(
    model: Path | str, update_mode: str = "keep", groups: int = 2, staleness: int = 0, **queue: Any
) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"train": ["unused"], "max_prompt_tokens": 64},
            "rollout": {
                "dtype": "float32",
                "max_model_len": 4000,
                "max_tokens": BRIEF,
                "threads": 1,
                "group_size": GROUP,
                "update_mode": update_mode,
            },
            "queue": {"groups_per_step": groups, "demonstrations_per_step": 1, "max_staleness": staleness} | queue,
            "learner": {"row_tokens": 5000},
            "evaluation": {"prompts": 0},
        }
    )


class Reward:
    """Scores by order. The reward service has tests of its own; here it would only cost its start."""

    async def score(self, request: Any) -> list[Score]:
        return [Score(float(i)) for i, _ in enumerate(request.responses)]


class MortalReward:
    """A reward whose process dies in its first call."""

    async def score(self, request: Any) -> list[Score]:
        os._exit(1)


class Handle:
    """As Serve's, whose every call goes to a replica that is not known to be dead: here to the next one.

    With Serve's own, which replica a call reaches and what it has begun when it dies is a matter of moments.
    """

    def __init__(self, *replicas: type) -> None:
        self._replicas = [ray.remote(replica).remote() for replica in replicas]

    @property
    def score(self) -> Any:
        return self

    def remote(self, request: Any) -> Any:
        return self._replicas.pop(0).score.remote(request)


class Rollout(RolloutActor):
    """The real actor, whose settings can be changed, and whose responses with the seeds `endless` never end.

    No model ends some responses and never ends others on any machine: so their number of tokens says it.
    """

    endless: frozenset[int] = frozenset()

    async def prepare(self, config: Config, queue: Any, reward: Any, endless: set[int]) -> None:
        self._config, self.endless, self._stopping = config, frozenset(endless), False
        await self.attach(queue, reward)

    def _sampling(self, temperature: float, max_tokens: int, seed: int) -> Any:
        params = super()._sampling(temperature, max_tokens, seed)
        params.max_tokens = params.min_tokens = ENDLESS if seed in self.endless else max_tokens
        return params

    async def running(self) -> int:
        """Responses in the engine."""
        return self._engine.output_processor.get_num_unfinished_requests()

    async def engine_process(self) -> int:
        [found] = [p for p in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]
        return found.pid

    async def sockets(self) -> list[str]:
        """Paths of those that this process and the engine's are connected by."""
        found = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
        folder = os.environ["VLLM_RPC_BASE_PATH"]
        return [words[-1] for words in found if words[-1].startswith(folder)]

    async def new_weights(self, version: int) -> None:
        """All of an update but the bytes, which make no difference to what becomes of running groups."""
        await self.start_weight_update()
        await self.finish_weight_update(version)
        await self.resume()


@pytest.fixture(scope="module")
def engine(ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from cluster.placement import Site, rollout_options

    model = tiny_model(tmp_path_factory.mktemp("long"), positions=4096)
    config = config_for(model)
    actor = ray_session.remote(Rollout).options(**rollout_options(config, Site())).remote("rollout-0", config, False)
    ray.get(actor.start.remote())
    yield actor
    ray.get(actor.shutdown.remote())
    ray.kill(actor)


@pytest.fixture
def begin(engine: Any) -> Iterator[Any]:
    """Start producing for a queue of its own; gives the queue."""
    others: list[Any] = []
    runs: list[Any] = []

    def start(config: Config, endless: set[int] = frozenset()) -> Any:  # type: ignore[assignment]
        queue, reward = start_queue(config, Counting(prompt), Counting(demonstration)), ray.remote(Reward).remote()
        others.extend([queue, reward])
        ray.get(engine.prepare.remote(config, queue, reward, endless))
        runs.append(engine.run.remote())
        return queue

    yield start
    ray.get([engine.stop.remote(), others[0].stop.remote()])
    ray.get(runs, timeout=WAIT_S)
    for actor in others:
        ray.kill(actor)


def seed_of(sequence: int, attempt: int, sample: int) -> int:
    return RolloutActor("", config_for("unused"), False)._seed(sequence, attempt) + sample


def groups_of(batch: Any) -> list[Group]:
    return [packed.group() for packed in batch.groups]


def wait_until(happened: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def test_an_engine_that_is_up_has_left_no_socket_behind(engine: Any) -> None:
    paths = ray.get(engine.sockets.remote())
    assert paths, "it has some"
    assert not any(Path(path).exists() or Path(path).parent.exists() for path in paths)


def test_an_endless_response_is_left_out_of_its_group_at_the_deadline(engine: Any, begin: Any) -> None:
    config = config_for("unused", group_timeout_s=1.0, on_straggler="accept", min_group=2)
    queue = begin(config, {seed_of(0, 0, 1)})
    batch = ray.get(queue.next_batch.remote(WAIT_S))
    first, second = groups_of(batch)
    assert [len(first.samples), len(second.samples)] == [GROUP - 1, GROUP]
    assert all(len(s.token_ids) == BRIEF for g in (first, second) for s in g.samples)
    assert [s.score.reward for s in first.samples if s.score] == [0.0, 1.0]
    assert ray.get(queue.stats.remote())["stragglers_accepted"] == 1
    assert ray.get(engine.running.remote()) == 0, "its request must have ended with it"


@pytest.mark.parametrize(("mode", "endless"), [("reissue", 1), ("accept", 2)])
def test_a_group_with_too_few_samples_is_made_anew_with_another_seed(
    engine: Any, begin: Any, mode: str, endless: int
) -> None:
    config = config_for("unused", group_timeout_s=1.0, on_straggler=mode, min_group=2)
    queue = begin(config, {seed_of(0, 0, i) for i in range(endless)})
    batch = ray.get(queue.next_batch.remote(WAIT_S))
    groups = groups_of(batch)
    assert [(g.prompt.id, len(g.samples)) for g in groups] == [("0", GROUP), ("1", GROUP)]
    stats = ray.get(queue.stats.remote())
    assert (stats["stragglers_reissued"], stats["stragglers_accepted"], stats["drawn"]) == (1, 0, 2)
    assert ray.get(engine.running.remote()) == 0


def test_a_prompt_that_never_ends_is_given_up_for_another(begin: Any) -> None:
    config = config_for("unused", lease_s=1.25, max_reissues=1)
    assert config.queue.sampling_s == 1.0, "without a group_timeout_s: a part of the lease"
    queue = begin(config, {seed_of(0, attempt, 0) for attempt in range(2)})
    batch = ray.get(queue.next_batch.remote(WAIT_S))
    assert [g.prompt.id for g in groups_of(batch)] == ["1", "2"]
    stats = ray.get(queue.stats.remote())
    assert (stats["stragglers_reissued"], stats["dropped_straggler"]) == (1, 1)


def test_new_weights_abort_running_groups_a_bounded_number_of_times(engine: Any, begin: Any) -> None:
    """With `rollout.update_mode: abort` and responses that take longer than any number of steps."""
    config = config_for("unused", update_mode="abort", groups=1, group_timeout_s=4.0)
    queue = begin(config, {seed_of(0, 0, 0)})
    for version in range(1, MAX_ABORTS + 1):
        wait_until(lambda: ray.get(engine.running.remote()) == 1)
        ray.get(engine.new_weights.remote(version))
        wait_until(lambda v=version: ray.get(queue.stats.remote())["aborted"] == v)
    assert ray.get(queue.stats.remote())["releases"] == {NEW_WEIGHTS: MAX_ABORTS}
    wait_until(lambda: ray.get(engine.running.remote()) == 1)
    ray.get(engine.new_weights.remote(MAX_ABORTS + 1))
    assert ray.get(engine.running.remote()) == 1, "the last attempt goes on with the new weights"
    assert ray.get(queue.stats.remote())["aborted"] == MAX_ABORTS


def test_new_weights_wait_for_running_responses(engine: Any) -> None:
    """With `rollout.update_mode: wait`: no response carries two versions, none is lost."""
    ray.get(engine.prepare.remote(config_for("unused", update_mode="wait", group_timeout_s=60.0), None, None, set()))
    running = engine.generate.remote([5, 6, 7, 8], GROUP, 1.0, 300, 1)
    wait_until(lambda: ray.get(engine.running.remote()) == GROUP)
    before = ray.get(engine.generate.remote([5], 1, 1.0, 1, 1))[0].versions[0].version
    ray.get(engine.new_weights.remote(before + 7))
    assert ray.wait([running], timeout=0.0)[0] or ray.get(engine.running.remote()) == 0
    samples = ray.get(running)
    assert [(len(s.token_ids), s.finish_reason) for s in samples] == [(300, "length")] * GROUP
    assert {span.version for s in samples for span in s.versions} == {before}
    [after] = ray.get(engine.generate.remote([5, 6, 7, 8], 1, 1.0, 4, 1))
    assert {span.version for span in after.versions} == {before + 7}


@pytest.mark.parametrize("deaths", [2, 3])
def test_a_group_is_scored_unless_three_replicas_are_lost_with_its_call(engine: Any, deaths: int) -> None:
    replicas = [MortalReward] * deaths + [Reward] * (3 - deaths)  # for no fourth call
    ray.get(engine.prepare.remote(config_for("unused"), None, Handle(*replicas), set()))
    [group] = ray.get(engine.evaluate.remote([prompt("0")], samples=2, temperature=1.0), timeout=WAIT_S)
    if deaths == 2:
        assert [s.score for s in group.samples] == [Score(0.0), Score(1.0)]
    else:
        assert [s.score and s.score.reward for s in group.samples] == [None, None]
        [reason] = set(group.unscored)
        assert re.fullmatch(r"reward service: \w*Actor\w*Error in each of 3 attempts", reason)


def test_an_engine_that_hangs_without_a_broadcast_ends_the_actors_work(engine: Any) -> None:
    """Within twice the timeout of a broadcast's phase. The last test: the engine goes on with what it had begun."""
    timeout_s, config = 1.0, config_for("unused")
    cluster = config.cluster.model_copy(update={"broadcast_timeout_s": timeout_s})
    queue, reward = start_queue(config, Counting(prompt), Counting(demonstration)), ray.remote(Reward).remote()
    process = ray.get(engine.engine_process.remote())
    ray.get(engine.prepare.remote(config.model_copy(update={"cluster": cluster}), queue, reward, {seed_of(0, 0, 0)}))
    run = engine.run.remote()
    wait_until(lambda: ray.get(engine.running.remote()) > 0)
    os.kill(process, signal.SIGSTOP)
    try:
        with pytest.raises(EngineDiedError, match=f"rollout-0: the engine gave no answer for {2 * timeout_s:g} s"):
            ray.get(run, timeout=WAIT_S)
    finally:
        os.kill(process, signal.SIGCONT)
        ray.get(queue.stop.remote())
        for actor in (queue, reward):
            ray.kill(actor)
