"""From requests to scores: cache, reward functions within their time limit, weights, expert score."""

from __future__ import annotations

import math
import numbers
import reprlib
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

from uniapl.discriminators import Comparison, Discriminator
from uniapl.records import Prompt, Score
from uniapl.rewards.cache import ScoreCache, cache_key
from uniapl.rewards.calls import CallPool
from uniapl.rewards.registry import Reward
from uniapl.rewards.types import RewardResult, ScoreRequest, UnscorableError

REASON_CHARS = 200
MAX_CHECKS = 100
"""Of one response; each is a metric of the run."""
MAX_NAME_CHARS = 100


class Scorer:
    """Scores batches of groups; safe to call from several threads.

    A reward is taken to be a function of prompt and response: equal pairs are computed once.

    Args:
        rewards: what is summed, each value times its weight.
        cache: where single results are kept; only results of functions that succeeded.
        timeout_s: seconds that one call of a reward function may take.
        discriminator: fills `expert_score` and `expert_reference` where the prompt has an expert response.
        pool: the threads that call the reward functions.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        cache: ScoreCache,
        timeout_s: float,
        discriminator: Discriminator | None = None,
        pool: CallPool | None = None,
    ) -> None:
        self._rewards = list(rewards)
        self._cache = cache
        self._timeout_s = timeout_s
        self._discriminator = discriminator
        self._pool = pool or CallPool()
        self._counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        for reward in self._rewards:
            reward.warm_up()  # loading takes seconds, which are not to count as the first call's

    @property
    def healthy(self) -> bool:
        """False when so many calls hang that this process should be replaced."""
        return self._pool.healthy

    def stats(self) -> dict[str, int]:
        """Counters since the start: samples, unscored, calls, cache hits, errors of Redis, timeouts."""
        with self._counting:
            counts = dict(self._counts)
        names = ("batches", "samples", "unscored", "calls", "cache_hits")
        return {**{name: counts.get(name, 0) for name in names}, **self._cache.stats(), **self._pool.stats()}

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Score]]:
        """One list of scores per request, one score per response, in order."""
        samples = [(request.prompt, response) for request in requests for response in request.responses]
        outcomes = self._outcomes(samples)
        scores = [_total(self._rewards, outcomes[i :: len(samples)]) for i in range(len(samples))]
        grouped, start = [], 0
        for request in requests:
            grouped.append(scores[start : start + len(request.responses)])
            start += len(request.responses)
        self._add_expert_scores(requests, grouped)
        self._count(batches=1, samples=len(scores), unscored=sum(score.reward is None for score in scores))
        return grouped

    def _outcomes(self, samples: Sequence[tuple[Prompt, str]]) -> list[RewardResult | str]:
        """Result, or why there is none, for reward 0 of every sample, reward 1 of every sample, ..."""
        wanted = [(reward, prompt, response) for reward in self._rewards for prompt, response in samples]
        keys = [cache_key(reward.name, reward.version, prompt, response) for reward, prompt, response in wanted]
        distinct = dict(zip(keys, wanted, strict=True))
        cached = self._cache.get_many(list(distinct))
        known: dict[str, RewardResult | str] = {k: r for k, r in zip(distinct, cached, strict=True) if r is not None}
        missing = {key: call for key, call in distinct.items() if key not in known}
        returned = self._pool.run([_bound(*call) for call in missing.values()], self._timeout_s)
        computed = {key: _checked(missing[key][0].name, value) for key, value in zip(missing, returned, strict=True)}
        self._cache.put_many({key: r for key, r in computed.items() if isinstance(r, RewardResult)})
        self._count(calls=len(missing), cache_hits=len(known))
        known.update(computed)
        return [known[key] for key in keys]

    def _add_expert_scores(self, requests: Sequence[ScoreRequest], grouped: Sequence[Sequence[Score]]) -> None:
        if self._discriminator is None:
            return
        pairs = [
            (Comparison(request.prompt.messages, request.prompt.expert_response, request.responses), scores)
            for request, scores in zip(requests, grouped, strict=True)
            if request.prompt.expert_response is not None
        ]
        try:
            found = self._discriminator.scores([compared for compared, _ in pairs])
        except Exception as error:  # the samples are then unscored, with this reason
            for _, scores in pairs:
                for score in scores:
                    score.reward, score.unscored = None, _reason("discriminator", error)
            return
        for (_, scores), expert in zip(pairs, found, strict=True):
            for score, value in zip(scores, expert.responses, strict=True):
                score.expert_score, score.expert_reference = value, expert.reference

    def _count(self, **counts: int) -> None:
        with self._counting:
            self._counts.update(counts)


def _bound(reward: Reward, prompt: Prompt, response: str) -> Any:
    return lambda: reward.function(prompt, response)


def _checked(name: str, returned: Any) -> RewardResult | str:
    """A reward function's outcome as a result with a finite value, or the reason why it is none."""
    if isinstance(returned, BaseException):
        return _reason(name, returned)
    result = returned if isinstance(returned, RewardResult) else RewardResult(returned)
    value = result.value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return _reason(name, f"returned {type(value).__name__} {reprlib.repr(value)}; allowed: a finite number")
    try:
        number = float(value)
    except Exception:  # such as OverflowError; a user's own kind of number may raise anything
        number = math.inf
    if not math.isfinite(number):
        return _reason(name, f"returned {reprlib.repr(value)}; allowed: a finite number")
    if not isinstance(result.checks, dict) or not all(map(_is_check, result.checks.items())):
        return _reason(name, f"returned checks {reprlib.repr(result.checks)}; allowed: true or false by name")
    if len(result.checks) > MAX_CHECKS:
        return _reason(name, f"returned {len(result.checks)} checks; allowed: <= {MAX_CHECKS}")
    return RewardResult(number, dict(result.checks))


def _is_check(item: tuple[Any, Any]) -> bool:
    """A name that can stand in a metric's, and true or false."""
    name, passed = item
    return isinstance(passed, bool) and isinstance(name, str) and name.isprintable() and 0 < len(name) <= MAX_NAME_CHARS


def _reason(name: str, what: object) -> str:
    text = f"{name}: {' '.join(_message(what).split())}"
    return text if len(text) <= REASON_CHARS else text[: REASON_CHARS - 3] + "..."


def _message(what: object) -> str:
    if not isinstance(what, BaseException):
        return str(what)
    try:
        message = str(what)
    except Exception:  # a user's exception may fail to describe itself
        message = ""
    kind = type(what).__name__
    if isinstance(what, UnscorableError | TimeoutError):
        return message or kind
    return f"{kind}: {message}" if message else kind


def _total(rewards: Sequence[Reward], outcomes: Sequence[RewardResult | str]) -> Score:
    """Sum of weight x value; unscored, with every reason, if any of the rewards has no value."""
    reasons = [outcome for outcome in outcomes if isinstance(outcome, str)]
    results = [outcome for outcome in outcomes if isinstance(outcome, RewardResult)]
    checks = _merged_checks(rewards, outcomes)
    if reasons:
        return Score(reward=None, unscored="; ".join(reasons), checks=checks)
    total = sum(reward.weight * result.value for reward, result in zip(rewards, results, strict=True))
    if not math.isfinite(total):
        return Score(reward=None, unscored="the weighted sum of the rewards is not finite", checks=checks)
    return Score(reward=total, checks=checks)


def _merged_checks(rewards: Sequence[Reward], outcomes: Sequence[RewardResult | str]) -> dict[str, bool]:
    """Checks of all rewards; a name that an earlier reward used is told apart by its reward's name."""
    merged: dict[str, bool] = {}
    for reward, outcome in zip(rewards, outcomes, strict=True):
        if isinstance(outcome, RewardResult):
            merged.update({f"{reward.name}/{k}" if k in merged else k: v for k, v in outcome.checks.items()})
    return merged
