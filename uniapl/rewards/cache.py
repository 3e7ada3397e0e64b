"""The score cache: results of reward functions under a hash of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Protocol
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from uniapl.config import RewardConfig
from uniapl.config_errors import ConfigError
from uniapl.config_types import REDIS_PASSWORD
from uniapl.records import Prompt
from uniapl.rewards.types import RewardResult

KEY_PREFIX = "uniapl:score:"
EXPIRE_S = 30 * 24 * 3600
"""A score outlives its run, but not for ever: keys of changed rewards are never asked for again."""
CONNECT_TIMEOUT_S = 1.0
READ_TIMEOUT_S = 2.0
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0

_log = logging.getLogger(__name__)


class ScoreCache(Protocol):
    """Results by key; None where there is none."""

    def get_many(self, keys: Sequence[str]) -> list[RewardResult | None]: ...

    def put_many(self, results: Mapping[str, RewardResult]) -> None: ...

    def stats(self) -> dict[str, int]: ...


def cache_key(name: str, version: str, prompt: Prompt, response: str) -> str:
    """SHA-256 of reward name and version, the prompt's messages and verifier, and the response."""
    text = json.dumps([name, version, prompt.messages, prompt.verifier, response], sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def open_cache(config: RewardConfig) -> ScoreCache:
    """The cache that the configuration names: Redis, or this process's memory."""
    if config.redis_url is not None:
        return RedisCache(config.redis_url)
    return MemoryCache(config.cache_entries)


class MemoryCache:
    """The `entries` most recently used results, in this process."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._results: OrderedDict[str, RewardResult] = OrderedDict()
        self._lock = threading.Lock()

    def get_many(self, keys: Sequence[str]) -> list[RewardResult | None]:
        with self._lock:
            for key in keys:
                if key in self._results:
                    self._results.move_to_end(key)
            return [self._results.get(key) for key in keys]

    def put_many(self, results: Mapping[str, RewardResult]) -> None:
        with self._lock:
            for key, result in results.items():
                self._results[key] = result
                self._results.move_to_end(key)
            while len(self._results) > self._entries:
                self._results.popitem(last=False)

    def stats(self) -> dict[str, int]:
        return {"entries": len(self._results)}


class RedisCache:
    """Results in Redis as JSON, shared by processes and runs.

    A lost server never stops scoring: every call that goes without it is counted, one warning is
    logged when it is lost and one line when it is back, and it is tried again after 1 s, 2 s, ...
    at most 60 s.
    """

    def __init__(self, url: str, first_retry_s: float = FIRST_RETRY_S) -> None:
        self._client = _client(url)
        self._where = _shown(url)
        self._first_retry_s = first_retry_s
        self._lock = threading.Lock()
        self._pause_s, self._retry_at = 0.0, 0.0
        self._errors = self._skipped = self._unreadable = 0

    def get_many(self, keys: Sequence[str]) -> list[RewardResult | None]:
        if not keys or not self._available():
            return [None] * len(keys)
        try:
            found = self._client.mget([KEY_PREFIX + key for key in keys])
        except redis.RedisError as error:
            self._lost(error)
            return [None] * len(keys)
        self._found()
        return [self._read(text) for text in found]

    def put_many(self, results: Mapping[str, RewardResult]) -> None:
        if not results or not self._available():
            return
        pipeline = self._client.pipeline(transaction=False)
        for key, result in results.items():
            text = json.dumps({"value": result.value, "checks": result.checks}, sort_keys=True)
            pipeline.set(KEY_PREFIX + key, text, ex=EXPIRE_S)
        try:
            pipeline.execute()
        except redis.RedisError as error:
            self._lost(error)
            return
        self._found()

    def stats(self) -> dict[str, int]:
        """Failed calls, calls skipped while waiting to try again, and values that were not ours."""
        return {
            "redis_errors": self._errors,
            "redis_skipped": self._skipped,
            "redis_unreadable": self._unreadable,
        }

    def _available(self) -> bool:
        with self._lock:
            available = time.monotonic() >= self._retry_at
            self._skipped += not available
            return available

    def _lost(self, error: redis.RedisError) -> None:
        with self._lock:
            self._errors += 1
            if self._pause_s == 0:
                _log.warning("score cache %s lost, scoring goes on without it: %s", self._where, _reason(error))
            self._pause_s = min(max(2 * self._pause_s, self._first_retry_s), LAST_RETRY_S)
            self._retry_at = time.monotonic() + self._pause_s

    def _found(self) -> None:
        with self._lock:
            if self._pause_s > 0:
                _log.warning("score cache %s is back", self._where)
            self._pause_s = self._retry_at = 0.0

    def _read(self, text: bytes | str | None) -> RewardResult | None:
        if text is None:
            return None
        try:
            stored = json.loads(text)
            result = RewardResult(float(stored["value"]), {str(k): bool(v) for k, v in stored["checks"].items()})
        except (ValueError, TypeError, KeyError, AttributeError):
            result = RewardResult(math.nan)
        if math.isfinite(result.value):
            return result
        with self._lock:
            self._unreadable += 1
        return None


def require_redis(url: str) -> None:
    """Check that a Redis server answers at `url`.

    Raises:
        ConfigError: the address is wrong, or nothing answers there within two seconds.
    """
    client = _client(url)
    try:
        client.ping()
    except (redis.RedisError, TypeError) as error:  # TypeError: an option in the URL that redis-py does not know
        raise ConfigError(
            f"reward.redis_url: got '{_shown(url)}'; no answer: {_reason(error)}; "
            "allowed: a Redis server that runs, or null"
        ) from None
    finally:
        client.close()


def probe_redis(url: str) -> float:
    """Write and read a value as the score cache does; returns the seconds of both.

    Raises:
        ConfigError: nothing answers, or it refuses.
    """
    require_redis(url)
    client, began = _client(url), time.monotonic()
    try:
        client.set(KEY_PREFIX + "probe", "1", ex=10)
        client.mget([KEY_PREFIX + "probe"])
    except redis.RedisError as error:
        raise ConfigError(
            f"reward.redis_url: got '{_shown(url)}'; it refuses: {_reason(error)}; "
            f"allowed: a user who may MGET and SET {KEY_PREFIX}*"
        ) from None
    finally:
        client.close()
    return time.monotonic() - began


def _client(url: str) -> redis.Redis:
    """A client that has not connected yet; the password is the environment's."""
    try:
        return redis.Redis.from_url(
            url,
            password=os.environ.get(REDIS_PASSWORD) or None,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=READ_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:
        raise ConfigError(
            f"reward.redis_url: got '{_shown(url)}'; {error}; allowed: such as redis://host:6379/0"
        ) from None


def _reason(error: Exception) -> str:
    """What Redis or its client says, in one line, without the password whoever put it there."""
    password = os.environ.get(REDIS_PASSWORD)
    said = " ".join(str(error).split())
    return said.replace(password, "***") if password else said


def _shown(url: str) -> str:
    """The address without user and options."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
