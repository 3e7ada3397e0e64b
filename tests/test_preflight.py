"""What a run needs is looked for before any process starts: the discriminator's folders, Redis."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_cli import session_members, start
from helpers_discriminator import tiny_reward_model
from helpers_redis import free_port
from helpers_toy import toy_config

from cluster.preflight import preflight
from uniapl.config import Config, load_config
from uniapl.config_errors import ConfigError


def config(folder: Path, model: Path, discriminator: str, **keys: object) -> Config:
    overrides = ["weight=0.1", f"discriminator={discriminator}", *(f"{key}={value}" for key, value in keys.items())]
    return load_config(toy_config(folder, model), [f"objective.adversarial.{override}" for override in overrides])


@pytest.mark.parametrize("kind", ["embedding", "reference_reward", "cotrained"])
def test_held_out_prompts_come_back_when_all_is_there(tiny: Path, tmp_path: Path, kind: str) -> None:
    reward_model = tiny_reward_model(tmp_path / "reward")
    assert len(preflight(config(tmp_path / "toy", tiny, kind, reward_model=reward_model))) == 4


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("embedding", "encoder"),
        ("reference_reward", "reward_model"),
        ("cotrained", "cotrained.model"),
    ],
)
def test_a_wrong_folder_is_one_line_and_nothing_else(
    tiny: Path, tmp_path: Path, kind: str, key: str, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = toy_config(tmp_path / "toy", tiny).parent
    (wrong / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3Model"]}')
    with pytest.raises(ConfigError) as error:
        preflight(config(tmp_path / "toy", tiny, kind, **{key: wrong}))
    assert str(error.value).startswith(f"objective.adversarial.{key}: got '{wrong}'") and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_reference_of_another_vocabulary_is_one_line(tiny: Path, tmp_path: Path) -> None:
    path = toy_config(tmp_path / "toy", tiny)
    other = tmp_path / "other"
    other.mkdir()
    keys = ["objective.kl.weight=0.1", f"objective.kl.reference={other}"]
    with pytest.raises(ConfigError) as error:
        preflight(load_config(path, keys))
    assert str(error.value) == (
        f"objective.kl.reference: got '{other}'; allowed: a Hugging Face folder with a config.json"
    )
    (other / "config.json").write_text('{"vocab_size": 7}')
    with pytest.raises(ConfigError) as error:
        preflight(load_config(path, keys))
    assert str(error.value) == (
        f"objective.kl.reference: got '{other}', which has a vocabulary of 7; allowed: the policy's, 384"
    )


def test_a_redis_that_gives_no_answer_is_one_line(tiny: Path, tmp_path: Path) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    with pytest.raises(ConfigError) as error:
        preflight(load_config(toy_config(tmp_path, tiny, reward={"redis_url": url})))
    assert str(error.value).startswith(f"reward.redis_url: got '{url}'; no answer: ") and "\n" not in str(error.value)


def test_the_command_then_ends_before_a_run_folder_or_a_process_of_ray_is_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "ray"))
    url = f"redis://127.0.0.1:{free_port()}"
    process = start(toy_config(tmp_path, tiny), f"reward.redis_url={url}")
    [line] = process.communicate(timeout=300)[0].splitlines()
    assert process.returncode == 2, line
    assert line.startswith(f"reward.redis_url: got '{url}'; no answer: ")
    assert session_members(process.pid) == {}
    assert not (tmp_path / "runs").exists() and not (tmp_path / "ray").exists()
