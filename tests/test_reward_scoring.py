"""From reward functions to scores: names, weights, what makes a sample unscored, time limits, cache."""

from __future__ import annotations

import sys
import threading
import time
from fractions import Fraction

import helpers_rewards
import numpy as np
import pytest
from helpers_rewards import make_prompt

from uniapl.config import RewardFunction
from uniapl.config_errors import ConfigError
from uniapl.discriminators import ExpertScores
from uniapl.records import Score
from uniapl.rewards import Reward, RewardResult, ScoreRequest, resolve
from uniapl.rewards.cache import MemoryCache, cache_key
from uniapl.rewards.calls import CallPool
from uniapl.rewards.scoring import Scorer


def scorer(*rewards: Reward, timeout_s: float = 20.0, entries: int = 100, **options) -> Scorer:
    return Scorer(rewards, MemoryCache(entries), timeout_s, **options)


def reward(function, name: str = "mine", weight: float = 1.0, version: str = "1") -> Reward:
    return Reward(name, weight, version, function)


def score_one(subject: Scorer, response: str = "a response", **prompt) -> Score:
    [[score]] = subject.score([ScoreRequest(make_prompt(**prompt), [response])])
    return score


# --- names ---------------------------------------------------------------------------------------


def test_a_users_function_is_named_as_module_and_function():
    [found] = resolve([RewardFunction(name="helpers_rewards:length", weight=2.0, version="7")])
    assert found == Reward("helpers_rewards:length", 2.0, "7", helpers_rewards.length)


def test_built_in_rewards_are_found_by_name():
    names = ["ifeval", "ifbench", "exact_match", "math"]
    assert [found.name for found in resolve([RewardFunction(name=name) for name in names])] == names


NEXT = "; allowed: module:name, the module below the current folder or installed"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["iefval"],
            "reward.functions.0.name: got 'iefval'; allowed: ifeval, ifbench, exact_match, math, module:function, or http(s)://HOST:PORT",
        ),
        (["math", "math"], "reward.functions.1.name: got 'math' a second time; allowed: each name once"),
        (
            ["math", "no_such_module:f"],
            "reward.functions.1.name: got 'no_such_module:f'; cannot import no_such_module: "
            "ModuleNotFoundError: No module named 'no_such_module'" + NEXT,
        ),
        (
            ["broken_reward:f"],
            "reward.functions.0.name: got 'broken_reward:f'; cannot import broken_reward: "
            "ZeroDivisionError: division by zero" + NEXT,
        ),
        (
            ["helpers_rewards:nothing"],
            "reward.functions.0.name: got 'helpers_rewards:nothing'; module helpers_rewards has no nothing" + NEXT,
        ),
        (
            ["helpers_rewards:not_callable"],
            "reward.functions.0.name: got 'helpers_rewards:not_callable'; "
            "module helpers_rewards is not callable: not_callable" + NEXT,
        ),
        (
            ["helpers_rewards:asynchronous"],
            "reward.functions.0.name: got 'helpers_rewards:asynchronous', an async function; allowed: a plain function",
        ),
        (
            [":f"],
            "reward.functions.0.name: got ':f'; allowed: ifeval, ifbench, exact_match, math, module:function, or http(s)://HOST:PORT",
        ),
    ],
)
def test_a_wrong_name_is_one_line_that_says_what_is_allowed(names, message, tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as error:
        resolve([RewardFunction(name=name) for name in names])
    assert str(error.value) == message
    sys.modules.pop("broken_reward", None)


# --- values --------------------------------------------------------------------------------------


def test_the_reward_is_the_weighted_sum_and_the_checks_of_all_functions():
    subject = scorer(reward(helpers_rewards.length, "length", 0.5), reward(helpers_rewards.polite, "polite", -3.0))
    assert score_one(subject, "please") == Score(reward=0.0, checks={"please": True})


def test_checks_of_one_name_are_told_apart_by_the_reward():
    subject = scorer(reward(helpers_rewards.polite, "a"), reward(helpers_rewards.polite, "b"))
    assert score_one(subject, "no").checks == {"please": False, "b/please": False}


@pytest.mark.parametrize("value", [0, 1, -2.5, Fraction(1, 2), np.float32(0.5), np.int64(3)])
def test_every_real_number_is_a_value(value):
    score = score_one(scorer(reward(lambda prompt, response: value)))
    assert score == Score(reward=float(value)) and type(score.reward) is float


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def _raise(error: BaseException):
    def function(prompt, response):
        raise error

    return function


def _return(value):
    return lambda prompt, response: value


UNSCORED = [
    (_raise(ValueError("bad\nthing")), "mine: ValueError: bad thing"),
    (_raise(AssertionError()), "mine: AssertionError"),
    (_raise(SystemExit(3)), "mine: SystemExit: 3"),
    (_raise(_Unprintable()), "mine: _Unprintable"),
    (_raise(TimeoutError()), "mine: TimeoutError"),
    (_raise(ValueError("x" * 1000)), "mine: ValueError: " + "x" * 179 + "..."),
    (_return(float("nan")), "mine: returned nan; allowed: a finite number"),
    (_return(float("-inf")), "mine: returned -inf; allowed: a finite number"),
    (_return(np.float32("inf")), "mine: returned np.float32(inf); allowed: a finite number"),
    (_return(None), "mine: returned NoneType None; allowed: a finite number"),
    (_return("1.0"), "mine: returned str '1.0'; allowed: a finite number"),
    (_return(True), "mine: returned bool True; allowed: a finite number"),
    (_return([1.0]), "mine: returned list [1.0]; allowed: a finite number"),
    (_return(1j), "mine: returned complex 1j; allowed: a finite number"),
    (_return(RewardResult(True)), "mine: returned bool True; allowed: a finite number"),
    (_return(RewardResult(1.0, {"a": 1})), "mine: returned checks {'a': 1}; allowed: true or false by name"),
    (_return(RewardResult(1.0, None)), "mine: returned checks None; allowed: true or false by name"),
    (lambda prompt: 1.0, "mine: TypeError: <lambda>() takes 1 positional argument but 2 were given"),
]


@pytest.mark.parametrize(("function", "reason"), UNSCORED, ids=[row[1][:40] for row in UNSCORED])
def test_what_is_no_finite_number_makes_the_sample_unscored_never_zero(function, reason):
    assert score_one(scorer(reward(function))) == Score(reward=None, unscored=reason)


def test_a_number_too_large_for_a_float_is_not_finite():
    score = score_one(scorer(reward(_return(10**400))))
    assert score.reward is None and "allowed: a finite number" in score.unscored


def test_a_weighted_sum_that_overflows_is_unscored():
    score = score_one(scorer(reward(_return(1e308), weight=1e10)))
    assert score == Score(reward=None, unscored="the weighted sum of the rewards is not finite")


def test_one_reward_without_a_value_makes_the_sample_unscored_with_every_reason():
    subject = scorer(
        reward(helpers_rewards.raises, "first"), reward(helpers_rewards.polite, "polite"), reward(_return(None), "last")
    )
    assert score_one(subject, "please") == Score(
        reward=None,
        unscored="first: KeyError: 'no such\\nkey'; last: returned NoneType None; allowed: a finite number",
        checks={"please": True},
    )


def test_only_the_sample_that_fails_is_unscored():
    subject = scorer(reward(lambda prompt, response: 1 / len(response)))
    [scores] = subject.score([ScoreRequest(make_prompt(), ["ab", "", "a"])])
    assert [score.reward for score in scores] == [0.5, None, 1.0]
    assert subject.stats()["unscored"] == 1


def test_scores_come_back_per_request_and_in_order():
    subject = scorer(reward(lambda prompt, response: len(response) + 10 * len(prompt.messages[0]["content"])))
    requests = [
        ScoreRequest(make_prompt(content="x"), ["", "a", "bb"]),
        ScoreRequest(make_prompt(content="xx"), []),
        ScoreRequest(make_prompt(content="xxx"), ["ccc"]),
    ]
    assert [[score.reward for score in scores] for scores in subject.score(requests)] == [[10, 11, 12], [], [33]]
    assert subject.score([]) == []


# --- expert score --------------------------------------------------------------------------------


class FirstLetter:
    """Stands in for the encoder, so that the expected scores can be read off: 1 for equal first letters."""

    def scores(self, comparisons):
        return [ExpertScores(1.5, [float(text[:1] == c.expert[:1]) for text in c.responses]) for c in comparisons]


class Broken:
    """An encoder that runs out of memory, which the real one does only on a machine that does."""

    def scores(self, comparisons):
        raise MemoryError("no room")


def test_the_expert_score_is_given_where_the_prompt_has_an_expert_response():
    subject = scorer(reward(helpers_rewards.length), discriminator=FirstLetter())
    requests = [ScoreRequest(make_prompt(), ["a"]), ScoreRequest(make_prompt(expert="abc"), ["a", "b"])]
    scores = [[(s.expert_score, s.expert_reference) for s in scores] for scores in subject.score(requests)]
    assert scores == [[(None, None)], [(1.0, 1.5), (0.0, 1.5)]]


def test_a_discriminator_that_fails_makes_its_samples_unscored():
    subject = scorer(reward(helpers_rewards.length), discriminator=Broken())
    requests = [ScoreRequest(make_prompt(), ["a"]), ScoreRequest(make_prompt(expert="abc"), ["a"])]
    [[without], [with_expert]] = subject.score(requests)
    assert without.reward == 1.0
    assert with_expert == Score(reward=None, unscored="discriminator: MemoryError: no room")


# --- time limits ---------------------------------------------------------------------------------


def test_a_call_that_takes_too_long_is_unscored_and_holds_up_nothing_else():
    released = threading.Event()

    def waits(prompt, response):
        if response == "slow":
            released.wait(30)
        return 1.0

    subject = scorer(reward(waits), timeout_s=0.3)
    started = time.monotonic()
    [scores] = subject.score([ScoreRequest(make_prompt(), ["slow", "quick", "also quick"])])
    assert time.monotonic() - started < 5
    assert [score.unscored for score in scores] == ["mine: took longer than 0.3 s", None, None]
    assert subject.healthy and subject.stats()["stuck_threads"] == 1
    released.set()


def test_the_limit_counts_from_a_calls_own_start_not_from_its_place_in_the_line():
    pool = CallPool(threads=1)
    outcomes = pool.run([lambda: time.sleep(0.2) or 7] * 4, timeout_s=0.6)
    assert outcomes == [7, 7, 7, 7]


def test_too_many_hanging_calls_make_the_pool_unhealthy_and_later_calls_fail_at_once():
    released = threading.Event()
    pool = CallPool(threads=2, max_stuck=1)
    outcomes = pool.run([released.wait] * 3 + [lambda: 1], timeout_s=0.2)
    assert [str(outcome) for outcome in outcomes[:3]] == ["took longer than 0.2 s"] * 3
    assert str(outcomes[3]) == "every thread is stuck in an earlier call"
    assert not pool.healthy and pool.stats() == {"stuck_threads": 3, "timeouts": 3}

    released.set()
    deadline = time.monotonic() + 10
    while not pool.healthy or pool.stats()["stuck_threads"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert pool.run([lambda: 1] * 5, timeout_s=5) == [1] * 5


def test_batches_from_several_threads_do_not_mix():
    subject = scorer(reward(lambda prompt, response: float(response)))
    results: dict[int, list[float | None]] = {}

    def work(start: int) -> None:
        [scores] = subject.score([ScoreRequest(make_prompt(), [str(start + i) for i in range(50)])])
        results[start] = [score.reward for score in scores]

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {100 * i: [float(100 * i + k) for k in range(50)] for i in range(4)}


# --- cache ---------------------------------------------------------------------------------------


@pytest.fixture
def calls():
    helpers_rewards.CALLS.clear()
    return helpers_rewards.CALLS


def test_a_response_seen_before_is_not_scored_again(calls):
    subject = scorer(reward(helpers_rewards.length))
    requests = [ScoreRequest(make_prompt(), ["aa", "b", "aa"])]
    first, second = subject.score(requests), subject.score(requests)
    assert first == second and sorted(calls) == ["aa", "b"]
    assert {key: subject.stats()[key] for key in ("calls", "cache_hits")} == {"calls": 2, "cache_hits": 2}


def test_what_was_unscored_is_tried_again():
    attempts = []

    def fails_once(prompt, response):
        attempts.append(response)
        if len(attempts) == 1:
            raise ConnectionError
        return 1.0

    subject = scorer(reward(fails_once))
    assert [score_one(subject).reward for _ in range(3)] == [None, 1.0, 1.0]
    assert len(attempts) == 2


def test_one_failing_function_does_not_keep_the_others_from_being_cached(calls):
    subject = scorer(reward(helpers_rewards.length, "length"), reward(helpers_rewards.raises, "raises"))
    assert [score_one(subject).reward for _ in range(2)] == [None, None]
    assert len(calls) == 1


def test_the_key_holds_everything_that_a_score_depends_on():
    prompt = make_prompt({"answer": "1"})
    base = cache_key("math", "1", prompt, "one")
    assert base == cache_key("math", "1", make_prompt({"answer": "1"}, expert="an expert's"), "one")
    others = [
        cache_key("exact_match", "1", prompt, "one"),
        cache_key("math", "2", prompt, "one"),
        cache_key("math", "1", make_prompt({"answer": "2"}), "one"),
        cache_key("math", "1", make_prompt({"answer": "1"}, content="Other."), "one"),
        cache_key("math", "1", prompt, "two"),
        cache_key("math", "1", prompt, "\ud800"),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_the_cache_in_memory_keeps_the_most_recently_used():
    cache = MemoryCache(2)
    one, two, three = (RewardResult(float(i)) for i in range(3))
    cache.put_many({"1": one, "2": two})
    cache.get_many(["1"])
    cache.put_many({"3": three})
    assert cache.get_many(["1", "2", "3"]) == [one, None, three]


def test_without_entries_nothing_is_kept(calls):
    subject = scorer(reward(helpers_rewards.length), entries=0)
    assert [score_one(subject, "aa").reward for _ in range(2)] == [2.0, 2.0]
    assert calls == ["aa", "aa"]
