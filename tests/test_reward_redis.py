"""The score cache in a real Redis server: shared by processes, lost and found again."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator

import helpers_rewards
import pytest
import redis
from helpers_redis import Server, free_port
from helpers_rewards import make_prompt

from uniapl.config import RewardConfig
from uniapl.config_errors import ConfigError
from uniapl.rewards import Reward, RewardResult, ScoreRequest
from uniapl.rewards.cache import EXPIRE_S, KEY_PREFIX, RedisCache, open_cache, require_redis
from uniapl.rewards.scoring import Scorer


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    server = Server(free_port(), tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def calls() -> list[str]:
    helpers_rewards.CALLS.clear()
    return helpers_rewards.CALLS


REWARD = Reward("length", 1.0, "1", helpers_rewards.length)


def score(cache, responses: list[str]) -> list[float | None]:
    [scores] = Scorer([REWARD], cache, 20.0).score([ScoreRequest(make_prompt(), responses)])
    return [score.reward for score in scores]


def test_scores_outlive_the_scorer_and_are_stored_as_json_that_expires(server, calls):
    assert score(open_cache(RewardConfig(redis_url=server.url)), ["a", "bb"]) == [1.0, 2.0]
    assert score(open_cache(RewardConfig(redis_url=server.url)), ["a", "bb", "ccc"]) == [1.0, 2.0, 3.0]
    assert sorted(calls) == ["a", "bb", "ccc"]
    client = redis.Redis.from_url(server.url)
    keys = client.keys()
    assert len(keys) == 3 and all(key.startswith(KEY_PREFIX.encode()) for key in keys)
    assert all(0 < client.ttl(key) <= EXPIRE_S for key in keys)
    assert sorted(json.loads(client.get(key))["value"] for key in keys) == [1.0, 2.0, 3.0]


def test_two_processes_share_scores(server, calls):
    script = (
        "import sys, helpers_rewards, test_reward_redis as t\n"
        "from uniapl.rewards.cache import RedisCache\n"
        "print(t.score(RedisCache(sys.argv[1]), ['a', 'bb']), helpers_rewards.CALLS)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, server.url],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.stdout, run.returncode) == ("[1.0, 2.0] ['a', 'bb']\n", 0), run.stderr
    assert score(RedisCache(server.url), ["a", "bb"]) == [1.0, 2.0]
    assert calls == []


def test_a_lost_server_is_counted_and_warned_of_once_and_scoring_goes_on(server, calls, caplog):
    cache = RedisCache(server.url, first_retry_s=60)
    assert score(cache, ["a"]) == [1.0]
    server.kill()
    with caplog.at_level(logging.WARNING):
        assert [score(cache, ["a"]) for _ in range(3)] == [[1.0]] * 3
    assert calls == ["a"] * 4
    assert cache.stats() == {"redis_errors": 1, "redis_skipped": 5, "redis_unreadable": 0}
    [warning] = caplog.messages
    assert warning.startswith(f"score cache {server.url} lost, scoring goes on without it: ")


def test_a_server_that_is_back_is_used_again(server, calls, caplog):
    cache = RedisCache(server.url, first_retry_s=0.05)
    server.kill()
    assert score(cache, ["a"]) == [1.0]
    server.start()
    deadline = time.monotonic() + 10
    while f"score cache {server.url} is back" not in caplog.messages:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        score(cache, ["a"])
    score(cache, ["a"])
    calls.clear()
    assert score(cache, ["a"]) == [1.0]
    assert calls == []


def test_a_pause_between_attempts_grows_to_a_bound(server):
    cache = RedisCache(server.url, first_retry_s=20.0)
    server.kill()
    pauses = []
    for _ in range(4):
        cache._retry_at = 0.0
        cache.get_many(["k"])
        pauses.append(round(cache._retry_at - time.monotonic()))
    assert pauses == [20, 40, 60, 60]


@pytest.mark.parametrize("stored", ["not json", '{"value": NaN, "checks": {}}', "[]", '{"value": 1}', b"\xff"])
def test_a_value_that_is_not_ours_is_a_miss_and_counted(server, stored):
    cache = RedisCache(server.url)
    redis.Redis.from_url(server.url).set(KEY_PREFIX + "k", stored)
    assert cache.get_many(["k", "other"]) == [None, None]
    assert cache.stats()["redis_unreadable"] == 1
    cache.put_many({"k": RewardResult(0.5, {"a": True})})
    assert cache.get_many(["k"]) == [RewardResult(0.5, {"a": True})]


def test_a_server_that_refuses_to_write_does_not_stop_scoring(server, calls):
    redis.Redis.from_url(server.url).config_set("maxmemory", "1")
    cache = RedisCache(server.url)
    assert score(cache, ["a"]) == [1.0]
    assert cache.stats()["redis_errors"] == 1


def test_an_unreachable_server_is_one_line_without_the_password():
    port = free_port()
    with pytest.raises(ConfigError) as error:
        require_redis(f"redis://user:secret@127.0.0.1:{port}/0")
    line = str(error.value)
    assert line.startswith(f"reward.redis_url: got 'redis://127.0.0.1:{port}/0'; no answer: ")
    assert line.endswith("; allowed: a Redis server that runs, or null")
    assert "secret" not in line and "\n" not in line


def test_an_option_that_does_not_exist_is_one_line(server):
    with pytest.raises(ConfigError, match=r"no answer: .*unexpected keyword argument 'colour'"):
        require_redis(f"{server.url}?colour=red")


def test_a_wrong_address_is_one_line():
    with pytest.raises(ConfigError, match=r"^reward.redis_url: got 'redis://127.0.0.1:port/0'; Port could not be cast"):
        require_redis("redis://127.0.0.1:port/0")
