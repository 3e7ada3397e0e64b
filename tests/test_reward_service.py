"""The reward service on a real Ray Serve: scores, batches, wrong configurations, replicas that hang."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from helpers_discriminator import compare, tiny_reward_model
from helpers_judge import judge
from helpers_rewards import make_prompt
from ray import serve
from ray._private.state import actors
from ray.serve.handle import DeploymentHandle

from actors.reward_service import application, start_reward_service, stop_reward_service
from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.discriminators import open_discriminator
from uniapl.records import Score
from uniapl.rewards import ScoreRequest
from uniapl.runlog import RunError

NO_COMMA = {"instructions": [{"id": "punctuation:no_comma", "kwargs": {}}]}
EXPERT = "The river runs to the sea."


def make_config(reward: dict[str, Any], discriminator: str = "none", **adversarial: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"train": ["unused"]},
            "evaluation": {"prompts": 0},
            "reward": reward,
            "objective": {"adversarial": {"discriminator": discriminator, **adversarial}},
        }
    )


CONFIG = make_config(
    {
        "functions": [{"name": "ifeval"}, {"name": "helpers_rewards:hangs_on_hang", "weight": 0.5}],
        "batch_size": 4,
        "batch_wait_s": 0.2,
        "timeout_s": 3.0,
        "max_replicas": 2,
    },
    discriminator="embedding",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    started_here = not ray.is_initialized()
    if started_here:
        ray.init("local", num_cpus=2, include_dashboard=False)
    yield
    if started_here:
        ray.shutdown()


@pytest.fixture(scope="module")
def service(cluster) -> Iterator[DeploymentHandle]:
    yield start_reward_service(CONFIG)
    stop_reward_service()


def request(*responses: str, expert: str | None = EXPERT) -> ScoreRequest:
    return ScoreRequest(make_prompt(NO_COMMA, expert), list(responses))


def test_a_group_is_scored_by_every_reward_and_by_the_discriminator(service):
    first, second = service.score.remote(request(EXPERT, "Well, no.")).result(timeout_s=60)
    [expected] = open_discriminator(CONFIG).scores([compare(EXPERT, [EXPERT, "Well, no."])])
    assert (first.reward, first.checks, first.unscored) == (1.5, {"punctuation:no_comma": True}, None)
    assert (second.reward, second.checks, second.unscored) == (0.5, {"punctuation:no_comma": False}, None)
    assert [first.expert_score, second.expert_score] == pytest.approx(expected.responses, abs=1e-6)
    assert first.expert_reference == second.expert_reference == 1.0


def test_without_an_expert_response_there_is_no_expert_score(service):
    scores = service.score.remote(request("Yes.", expert=None)).result(timeout_s=60)
    assert scores == [Score(reward=1.5, checks={"punctuation:no_comma": True})]


def test_a_verifier_that_cannot_judge_leaves_the_sample_unscored(service):
    [score] = service.score.remote(ScoreRequest(make_prompt(), ["Yes."])).result(timeout_s=60)
    assert score.reward is None
    assert score.unscored == "ifeval: prompt 'p1' has no verifier; allowed: JSON text with the key 'instructions'"


def test_groups_that_come_together_are_scored_in_batches(service):
    async def send(texts: list[str]) -> list[list[Score]]:
        return await asyncio.gather(*[service.score.remote(request(text)) for text in texts])

    before = service.stats.remote().result(timeout_s=60)
    scores = asyncio.run(send([f"Number {i}{',' * (i % 2)}" for i in range(8)]))
    after = service.stats.remote().result(timeout_s=60)
    assert [group[0].reward for group in scores] == [1.5, 0.5] * 4
    assert after["samples"] - before["samples"] == 8
    assert 2 <= after["batches"] - before["batches"] < 8


def test_a_group_seen_before_is_not_scored_again(service):
    for _ in range(2):
        before = service.stats.remote().result(timeout_s=60)
        service.score.remote(request("Seen twice.", "And this.")).result(timeout_s=60)
    after = service.stats.remote().result(timeout_s=60)
    assert (after["calls"] - before["calls"], after["cache_hits"] - before["cache_hits"]) == (0, 4)


def test_an_actor_scores_through_the_handle_that_it_was_given(service):
    @ray.remote(num_cpus=0)
    class Actor:
        def __init__(self, handle: DeploymentHandle) -> None:
            self._handle = handle

        async def rewards(self, scored: ScoreRequest) -> list[float | None]:
            return [score.reward for score in await self._handle.score.remote(scored)]

    actor = Actor.remote(service)
    assert ray.get(actor.rewards.remote(request("From an actor.")), timeout=120) == [1.5]
    ray.kill(actor)


def test_nothing_listens_for_http_and_no_core_is_reserved(service):
    assert serve.status().proxies == {}
    assert serve.status().applications[application()].status == "RUNNING"
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]


OTHER_RUN = """
import sys
import ray
sys.path.insert(0, "tests")
from helpers_judge import judge
from helpers_rewards import make_prompt
from actors.reward_service import start_reward_service
from test_reward_service import make_config
from uniapl.rewards import ScoreRequest

ray.init(address=sys.argv[1], log_to_driver=False)
handle = start_reward_service(make_config({"functions": [{"name": sys.argv[2]}]}))
[score] = handle.score.remote(ScoreRequest(make_prompt(), ["Four"])).result(timeout_s=60)
print("job", ray.get_runtime_context().get_job_id(), "scores", score.reward, flush=True)
sys.stdin.read()
"""


@contextmanager
def another_run() -> Iterator[str]:
    """A second driver on this cluster, with a server's reward, killed at the end of the block; its Ray job."""
    pipe, root = subprocess.PIPE, Path(__file__).resolve().parent.parent
    with judge() as server:
        command = [sys.executable, "-c", OTHER_RUN, ray.get_runtime_context().gcs_address, server.url]
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root)
        assert process.stdout
        try:
            lines = iter(process.stdout.readline, "")
            _, job, _, reward = next(line for line in lines if line.startswith("job ")).split()
            assert (reward, [asked["response"] for asked in server.asked]) == ("4.0", ["Four"])
            yield job
        finally:
            process.kill()
            process.communicate()


def serving(name: str) -> list[str]:
    """Class names of the actors that live and have `name` in theirs."""
    return [
        one["ActorClassName"] for one in actors().values() if name in one["ActorClassName"] and one["State"] != "DEAD"
    ]


def until_gone(name: str) -> None:
    deadline = time.monotonic() + 60
    while serving(name):
        assert time.monotonic() < deadline, serving(name)
        time.sleep(0.2)


def test_a_replica_in_which_too_many_calls_hang_is_replaced(service):
    pid = service.stats.remote().result(timeout_s=60)["pid"]
    scores = service.score.remote(request(*[f"hang {i}" for i in range(10)])).result(timeout_s=60)
    assert {score.unscored for score in scores} == {"helpers_rewards:hangs_on_hang: took longer than 3 s"}
    deadline = time.monotonic() + 120
    while True:
        try:
            if service.stats.remote().result(timeout_s=60)["pid"] != pid:
                break
        except ray.exceptions.RayError:  # the replica ended while it was asked
            pass
        assert time.monotonic() < deadline
        time.sleep(0.5)
    [score] = service.score.remote(request("After it.")).result(timeout_s=120)
    assert score.reward == 1.5


def test_with_more_groups_under_way_than_a_batch_a_second_replica_helps(service):
    """After the others with this service, which ask the one replica for its counters."""

    async def answered_by(round_: int) -> set[int]:
        slow = [service.score.remote(request(f"slow {round_}.{i}")) for i in range(4 * CONFIG.reward.batch_size)]
        told = await asyncio.gather(*[service.stats.remote() for _ in range(8)])
        assert {group[0].reward for group in await asyncio.gather(*slow)} == {1.5}
        return {stats["pid"] for stats in told}

    deadline = time.monotonic() + 120
    rounds = itertools.count()
    while len(asyncio.run(answered_by(next(rounds)))) < 2:
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            make_config({"functions": [{"name": "nonsense"}]}),
            "reward.functions.0.name: got 'nonsense'; allowed: ifeval",
        ),
        (
            make_config({"redis_url": "redis://127.0.0.1:1/0"}),
            "reward.redis_url: got 'redis://127.0.0.1:1/0'; no answer",
        ),
        (
            make_config({}, "embedding", encoder="nowhere"),
            "objective.adversarial.encoder: got 'nowhere'; nowhere/config.json is missing",
        ),
        (
            make_config({}, "reference_reward", reward_model="nowhere"),
            "objective.adversarial.reward_model: got 'nowhere'; nowhere/config.json is missing",
        ),
    ],
)
def test_what_the_configuration_names_and_is_not_there_is_one_line_before_anything_starts(config, message):
    with pytest.raises(ConfigError) as error:
        start_reward_service(config)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_second_run_has_a_service_of_its_own_which_ends_when_its_driver_is_killed_and_serve_with_the_last(service):
    with another_run() as job:
        assert set(serve.status().applications) == {application(), application(job)}
        [score] = service.score.remote(request("Still mine.")).result(timeout_s=60)
        assert score.reward == 1.5
        stop_reward_service()
        assert set(serve.status().applications) == {application(job)}
        assert len(serving("Serve")) == 2, "controller and replica"
    until_gone("Serve")


def test_a_reward_model_scores_in_the_service_as_it_does_here(cluster, tmp_path):
    stop_reward_service()
    config = make_config({}, "reference_reward", reward_model=str(tiny_reward_model(tmp_path)))
    asked = ScoreRequest(make_prompt(NO_COMMA, EXPERT, "Where to?"), ["To the sea.", "No, nowhere."])
    unpaired = ScoreRequest(make_prompt(NO_COMMA, None), ["To the sea."])
    handle = start_reward_service(config)
    calls = [handle.score.remote(one) for one in (asked, unpaired)]
    scores, [without] = [call.result(timeout_s=60) for call in calls]
    stop_reward_service()
    [expected] = open_discriminator(config).scores([compare(EXPERT, asked.responses, "Where to?")])
    assert [score.reward for score in scores] == [1.0, 0.0]
    assert [score.expert_score for score in scores] == pytest.approx(expected.responses, abs=1e-5)
    assert [score.expert_reference for score in scores] == pytest.approx([expected.reference] * 2, abs=1e-5)
    assert (without.expert_score, without.expert_reference) == (None, None)


def test_a_replica_that_cannot_start_is_an_error_that_says_why_and_leaves_nothing(cluster, monkeypatch):
    """Here the module of the user's reward exists in this process only."""
    stop_reward_service()
    module = types.ModuleType("only_here")
    module.reward = lambda prompt, response: 1.0
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.raises(RunError) as error:
        start_reward_service(make_config({"functions": [{"name": "only_here:reward"}]}))
    line = str(error.value)
    assert line.startswith("reward service failed to start: ") and "\n" not in line
    assert "reward.functions.0.name: got 'only_here:reward'; cannot import only_here: ModuleNotFoundError" in line
    assert line.endswith("`uniapl doctor CONFIG` checks what it needs")
    assert serve.status().applications == {}
    stop_reward_service()
