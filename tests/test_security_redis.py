"""Redis with an ACL user and over TLS; its password comes from the environment and goes nowhere else.

The packaged redis-server is built without TLS, so a small front of this test's own ends TLS before a real server.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from cryptography.hazmat.primitives import hashes
from helpers_redis import Server, free_port
from helpers_tls import self_signed

from uniapl.config_errors import ConfigError
from uniapl.config_types import REDIS_PASSWORD
from uniapl.rewards import RewardResult
from uniapl.rewards.cache import KEY_PREFIX, RedisCache, require_redis

PASSWORD = "planted-secret/@: 1"
ACL = f"--user default off --user uniapl on #HASH ~{KEY_PREFIX}* +mget +set +ping +client"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """A server whose one user may do no more than the score cache needs."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(PASSWORD.encode())
    options = ACL.replace("HASH", digest.finalize().hex())
    server = Server(free_port(), tmp_path_factory.mktemp("redis"), options.split())
    server.start()
    yield server
    server.kill()


@pytest.fixture
def url(server) -> str:
    return f"redis://uniapl@127.0.0.1:{server.port}/0"


def test_an_acl_user_with_the_environments_password_shares_scores(url, monkeypatch):
    monkeypatch.setenv(REDIS_PASSWORD, PASSWORD)
    require_redis(url)
    cache = RedisCache(url)
    cache.put_many({"k": RewardResult(0.5, {"a": True})})
    assert RedisCache(url).get_many(["k"]) == [RewardResult(0.5, {"a": True})]
    assert cache.stats()["redis_errors"] == 0


@pytest.mark.parametrize("password", ["wrong-secret", ""])
def test_a_wrong_or_missing_password_is_one_line_without_it(url, monkeypatch, password):
    monkeypatch.setenv(REDIS_PASSWORD, password)
    with pytest.raises(ConfigError, match=r"^reward.redis_url: got 'redis://127.0.0.1:\d+/0'; no answer: ") as error:
        require_redis(url)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_server_that_repeats_the_password_in_its_error_does_not_bring_it_into_the_log(monkeypatch, caplog):
    monkeypatch.setenv(REDIS_PASSWORD, PASSWORD)
    with _answering(f"-ERR no such user with {PASSWORD}\r\n".encode()) as port:
        cache = RedisCache(f"redis://uniapl@127.0.0.1:{port}/0")
        with caplog.at_level(logging.WARNING):
            assert cache.get_many(["k"]) == [None]
    assert "no such user with ***" in caplog.text and PASSWORD not in caplog.text


def test_tls_with_a_named_authority(server, monkeypatch, tls):
    monkeypatch.setenv(REDIS_PASSWORD, PASSWORD)
    url = f"rediss://uniapl@127.0.0.1:{tls.port}/0?ssl_ca_certs={tls.authority}"
    require_redis(url)
    RedisCache(url).put_many({"t": RewardResult(1.0)})
    plain = redis.Redis.from_url(server.url, username="uniapl", password=PASSWORD)
    assert plain.mget(KEY_PREFIX + "t") == [b'{"checks": {}, "value": 1.0}']


def test_tls_with_the_authority_of_the_environment(monkeypatch, tls):
    monkeypatch.setenv(REDIS_PASSWORD, PASSWORD)
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.authority))
    require_redis(f"rediss://uniapl@127.0.0.1:{tls.port}/0")


def test_a_certificate_of_nobody_known_is_refused(monkeypatch, tls):
    monkeypatch.setenv(REDIS_PASSWORD, PASSWORD)
    with pytest.raises(ConfigError, match=r"no answer: .*CERTIFICATE_VERIFY_FAILED"):
        require_redis(f"rediss://uniapl@127.0.0.1:{tls.port}/0")


def test_a_certificate_of_another_host_is_refused(monkeypatch, tls):
    monkeypatch.setenv(REDIS_PASSWORD, PASSWORD)
    with pytest.raises(ConfigError, match=r"no answer: .*[Hh]ostname mismatch"):
        require_redis(f"rediss://uniapl@localhost:{tls.port}/0?ssl_ca_certs={tls.authority}")


def test_an_authority_that_is_not_there_is_one_line(tls, tmp_path):
    with pytest.raises(ConfigError, match=r"^reward.redis_url: got 'rediss://127.0.0.1:\d+/0'; no answer: .+"):
        require_redis(f"rediss://127.0.0.1:{tls.port}/0?ssl_ca_certs={tmp_path}/none.pem")


class _Front:
    """Ends TLS on a free port of 127.0.0.1 and hands what it hears to a server without TLS."""

    def __init__(self, folder: Path, server_port: int) -> None:
        self.authority = folder / "certificate.pem"
        self._server_port = server_port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self_signed(self.authority))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed: the end
            while True:
                threading.Thread(target=self._serve, args=[self._listener.accept()[0]], daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with (
            suppress(OSError),
            self._context.wrap_socket(raw, server_side=True) as secured,
            socket.create_connection(("127.0.0.1", self._server_port)) as plain,
        ):
            while data := secured.recv(65536):  # the client waits for each answer
                plain.sendall(data)
                secured.sendall(plain.recv(65536))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def tls(server, tmp_path_factory) -> Iterator[_Front]:
    front = _Front(tmp_path_factory.mktemp("tls"), server.port)
    yield front
    front.close()


class _answering:
    """A server that says the same to whoever asks."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def __enter__(self) -> int:
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()
        return self._listener.getsockname()[1]

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                while connection.recv(65536):
                    connection.sendall(self._answer)

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
