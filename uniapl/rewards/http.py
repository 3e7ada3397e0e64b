"""A reward that a server of the user's gives over HTTP."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from typing import Any
from urllib.parse import SplitResult, urlsplit

import urllib3

from uniapl.config_errors import ConfigError
from uniapl.config_types import REWARD_TOKEN
from uniapl.records import Prompt
from uniapl.rewards.types import RewardResult, UnscorableError

SCHEMES = ("http://", "https://")
CONNECT_TIMEOUT_S = 5.0
AGAIN = urllib3.Retry(
    total=3,
    read=1,
    redirect=0,
    backoff_factor=0.5,
    backoff_max=5.0,
    retry_after_max=5,
    status_forcelist=(429, 502, 503, 504),
    allowed_methods=None,
    raise_on_status=False,
)
"""Of one call: after 0 s, 1 s and 2 s, or as the server says, where it is not there or says that it is not able to;
once where it was asked and did not answer."""
MAX_BYTES = 1 << 20
"""Of an answer."""
SHOWN_CHARS = 100
CONNECTIONS = 8
"""Kept open: as many as calls are made at a time (`CallPool`)."""


class HttpReward:
    """POSTs prompt and response as JSON; the answer is a JSON object with `reward` and, if it likes, `checks`.

    Sent: `messages`, `verifier`, `expert_response`, `response`, as a Python function would get them. With a token in
    the environment the request has it as `Authorization: Bearer`. Redirects are not followed. Safe to call from
    several threads.

    Args:
        url: of the endpoint.
        key: of the configuration, for the message.
        timeout_s: seconds that one attempt may wait for bytes.

    Raises:
        ConfigError: no such URL, or one that is not on loopback and no token in the environment.
    """

    def __init__(self, url: str, key: str, timeout_s: float) -> None:
        self._url, self._key = url, key
        parts = _parts(url, key)
        self._address = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
        token = os.environ.get(REWARD_TOKEN)
        if not token and not _loopback(self._address[0]):
            raise ConfigError(
                f"{key}: got '{url}', which is not on loopback; allowed: with a bearer token in the environment: "
                f"{REWARD_TOKEN}"
            )
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        limit = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=timeout_s)
        self._pool = urllib3.PoolManager(
            headers=headers, timeout=limit, retries=AGAIN, maxsize=CONNECTIONS, cert_reqs="CERT_REQUIRED"
        )

    def require(self) -> None:
        """Check that somebody listens there.

        Raises:
            ConfigError: nobody does, within 5 seconds.
        """
        try:
            socket.create_connection(self._address, CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ConfigError(
                f"{self._key}: got '{self._url}'; no answer: {error}; allowed: an endpoint that is up"
            ) from None

    def __call__(self, prompt: Prompt, response: str) -> RewardResult:
        """The server's verdict.

        Raises:
            UnscorableError: no answer, an error, or an answer of another form; says which.
        """
        asked = {
            "messages": prompt.messages,
            "verifier": prompt.verifier,
            "expert_response": prompt.expert_response,
            "response": response,
        }
        try:
            answer = self._pool.request(
                "POST", self._url, body=json.dumps(asked).encode(), redirect=False, preload_content=False
            )
            with answer:  # read to its end the connection is kept, else closed
                status, body = answer.status, answer.read(MAX_BYTES + 1, decode_content=True)
        except urllib3.exceptions.HTTPError as error:
            said = str(getattr(error, "reason", None) or error)
            raise UnscorableError(f"no answer: {said.partition('): ')[2] or said}") from None
        if status != 200:
            raise UnscorableError(f"answered {status}: {_shown(body)}")
        if len(body) > MAX_BYTES:
            raise UnscorableError(f"answered more than {MAX_BYTES} bytes")
        return _verdict(body)


def _parts(url: str, key: str) -> SplitResult:
    allowed = "allowed: http(s)://HOST[:PORT]/PATH, without user, password and query"
    try:
        parts = urlsplit(url)
        if parts.port == 0 or not parts.hostname or parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError
    except ValueError:
        shown = url.partition("?")[0].rpartition("@")[2]  # what is left out may be a secret
        raise ConfigError(f"{key}: got '{shown}'; {allowed}") from None
    return parts


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _verdict(body: bytes) -> RewardResult:
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "reward" not in found:
        raise UnscorableError(f"answered {_shown(body)}; allowed: a JSON object with 'reward'")
    return RewardResult(found["reward"], found.get("checks", {}))


def _shown(body: bytes) -> str:
    return repr(" ".join(body[: 4 * SHOWN_CHARS].decode("utf-8", "replace").split())[:SHOWN_CHARS])
