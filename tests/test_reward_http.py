"""Rewards that a server gives: what is sent, tried again, and not scored, and which servers may be asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_judge import Judge, judge
from helpers_redis import free_port
from helpers_rewards import make_prompt
from helpers_tls import self_signed
from helpers_toy import toy_config

from cluster import cli
from uniapl.config import RewardFunction
from uniapl.config_errors import ConfigError
from uniapl.config_types import REWARD_TOKEN
from uniapl.rewards import RewardResult, ScoreRequest, require_rewards, resolve
from uniapl.rewards.cache import MemoryCache
from uniapl.rewards.http import MAX_BYTES
from uniapl.rewards.scoring import Scorer


@pytest.fixture
def server() -> Iterator[Judge]:
    with judge() as made:
        yield made


def functions(url: str) -> list[RewardFunction]:
    return [RewardFunction(name=url)]


def unscored(server: Judge, response: str, timeout_s: float = 20.0) -> str:
    """Why the response has no reward, less the endpoint's name."""
    scorer = Scorer(resolve(functions(server.url), timeout_s), MemoryCache(9), timeout_s)
    [[score]] = scorer.score([ScoreRequest(make_prompt(), [response])])
    assert score.reward is None and score.unscored is not None
    return score.unscored.removeprefix(f"{server.url}: ")


def test_prompt_and_response_go_there_and_reward_and_checks_come_back(server: Judge) -> None:
    [reward] = resolve(functions(server.url))
    prompt = make_prompt({"answer": "x"}, "The expert's.")
    assert reward.function(prompt, "Four") == RewardResult(4.0, {"judge:short": True})
    assert server.asked == [
        {
            "messages": prompt.messages,
            "verifier": prompt.verifier,
            "expert_response": "The expert's.",
            "response": "Four",
        }
    ]
    assert "Authorization" not in server.headers[0]


def test_a_token_in_the_environment_goes_along(server: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REWARD_TOKEN, "t0ken")
    [reward] = resolve(functions(server.url))
    reward.function(make_prompt(), "Four")
    assert server.headers[0]["Authorization"] == "Bearer t0ken"


def test_over_tls_the_certificate_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = self_signed(tmp_path / "certificate.pem")
    with judge(certificate) as server:
        assert "certificate verify failed" in unscored(server, "Four")
        assert server.asked == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        [reward] = resolve(functions(server.url))
        assert reward.function(make_prompt(), "Four").value == 4.0


@pytest.mark.parametrize("code", [429, 502, 503, 504])
def test_what_may_pass_is_tried_again(server: Judge, code: int) -> None:
    [reward] = resolve(functions(server.url))
    assert reward.function(make_prompt(), f"{code} once") == RewardResult(8.0, {"judge:short": True})
    assert len(server.asked) == 2


def test_but_not_for_ever(server: Judge) -> None:
    assert unscored(server, "503 always") == "answered 503: 'not now'"
    assert len(server.asked) == 4


@pytest.mark.parametrize("code", [400, 401, 404, 500, 302])
def test_what_will_be_the_same_again_is_not_and_no_redirect_is_followed(server: Judge, code: int) -> None:
    assert unscored(server, f"{code} always") == f"answered {code}: 'not now'"
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("0.5", "answered '0.5'; allowed: a JSON object with 'reward'"),
        ("<html>", "answered '<html>'; allowed: a JSON object with 'reward'"),
        ('{"score": 1}', "answered '{\"score\": 1}'; allowed: a JSON object with 'reward'"),
        ("[" * 100_000, f"answered '{'[' * 100}'; allowed: a JSON object with 'reward'"),
        ("x" * (MAX_BYTES + 1), f"answered more than {MAX_BYTES} bytes"),
        ('{"reward": NaN}', "returned nan; allowed: a finite number"),
        ('{"reward": "1"}', "returned str '1'; allowed: a finite number"),
        ('{"reward": true}', "returned bool True; allowed: a finite number"),
        ('{"reward": 1, "checks": {"a": 1}}', "returned checks {'a': 1}; allowed: true or false by name"),
        ('{"reward": 1, "checks": []}', "returned checks []; allowed: true or false by name"),
    ],
)
def test_an_answer_of_another_form_is_no_reward(server: Judge, said: str, reason: str) -> None:
    assert unscored(server, f"say {said}") == reason


def test_a_server_that_hangs_takes_no_longer_than_a_call_may(server: Judge) -> None:
    assert unscored(server, "hang", timeout_s=0.5) == "took longer than 0.5 s"


def test_a_server_that_is_gone_leaves_samples_unscored(server: Judge) -> None:
    gone = server.url.replace(server.url.split(":")[2], f"{free_port()}/judge")
    scorer = Scorer(resolve(functions(gone)), MemoryCache(9), 20.0)
    [[score]] = scorer.score([ScoreRequest(make_prompt(), ["Four"])])
    reason = "no answer: Failed to establish a new connection: [Errno 111] Connection refused"
    assert (score.reward, score.unscored) == (None, f"{gone}: {reason}")


ALLOWED = "allowed: http(s)://HOST[:PORT]/PATH, without user, password and query"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:hunter2@127.0.0.1:80/judge", "127.0.0.1:80/judge"),
        ("http://127.0.0.1:80/judge?key=hunter2", "http://127.0.0.1:80/judge"),
        ("http://127.0.0.1:99999/", "http://127.0.0.1:99999/"),
        ("http://", "http://"),
        ("https://[::1/judge", "https://[::1/judge"),
    ],
)
def test_an_address_that_is_none_or_holds_a_secret_is_one_line_without_it(url: str, shown: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(functions(url))
    assert str(error.value) == f"reward.functions.0.name: got '{shown}'; {ALLOWED}"


@pytest.mark.parametrize("host", ["judge.example", "192.0.2.1:8000", "[2001:db8::1]", "127.0.0.1.example"])
def test_elsewhere_than_on_loopback_it_takes_a_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REWARD_TOKEN, raising=False)
    with pytest.raises(ConfigError, match=r"which is not on loopback; allowed: with a bearer token in the environment"):
        resolve(functions(f"https://{host}/judge"))
    monkeypatch.setenv(REWARD_TOKEN, "t0ken")
    assert resolve(functions(f"https://{host}/judge"))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.10", "[::1]"])
def test_on_loopback_it_needs_none(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REWARD_TOKEN, raising=False)
    assert resolve(functions(f"http://{host}:8000/judge"))


def test_the_command_says_that_nobody_listens_before_anything_starts(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], server: Judge
) -> None:
    url = f"http://127.0.0.1:{free_port()}/judge"
    config = toy_config(tmp_path, tiny)
    assert cli.main(["train", str(config), f"reward.functions=[{{name: '{url}'}}]"]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(
        f"reward.functions.0.name: got '{url}'; no answer: [Errno 111] Connection refused; allowed: "
    )
    assert not (tmp_path / "runs").exists()
    require_rewards(functions(server.url))
