"""What goes along with a job, and what is refused before anything is sent."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from helpers_cli import ROOT
from helpers_toy import toy_config

from cluster.cli import main
from cluster.jobs import LARGEST, PACKAGES, stage
from uniapl.config_errors import ConfigError

STAY = [
    ".env",
    ".git/config",
    ".hidden.py",
    "a.bin",
    "a.csv",
    "checkpoints/a.yaml",
    "checkpoints/b.pt",
    "configs/auth_token.yaml",
    "configs/hub.token.txt",
    "data/train.arrow",
    "docs/page.yaml",
    "key1.txt",
    "kubeconfig",
    "kubeconfig.yaml",
    "log.jsonl",
    "model.pt",
    "models/tiny/config.json",
    "my_secrets.yaml",
    "outputs/a.yaml",
    "outputs/b.pt",
    "own/__pycache__/reward.cpython-311.pyc",
    "own/api-key.yaml",
    "own/apikey.toml",
    "own/checkpoints/a.yaml",
    "own/credentials.toml",
    "own/id_rsa",
    "own/notes.parquet",
    "own/secrets.py",
    "own/wandb/run.yaml",
    "passwords.yaml",
    "runs/a/config.yaml",
    "service-account.json",
    "token",
    "token.txt",
    "token_hub.yaml",
    "wandb/a.yaml",
    "wandb/b.pt",
    "wandb_api_key_prod.txt",
    "wandb_key.txt",
]
GO = [
    "configs/job.yaml",
    "configs/key_words/donkey.yaml",
    "configs/keywords.yaml",
    "configs/methods/mine.yaml",
    "monkey.txt",
    "own/data/words.txt",
    "own/keys.py",
    "own/logs.py",
    "own/reward.py",
    "own/token_rewards.py",
    "own/tokenizer.py",
    "own/tokenizer/words.txt",
    "reward.py",
    "tokenizer.yaml",
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in STAY + GO:
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    return tmp_path / "project"


def test_code_and_configuration_go_along_and_nothing_else(project: Path, tmp_path: Path) -> None:
    sent = stage(project, tmp_path / "sent")
    assert sorted(name for name in sent if name.split("/")[0] not in PACKAGES) == GO
    assert {name.split("/")[0] for name in sent} >= set(PACKAGES)
    copied = {str(path.relative_to(tmp_path / "sent")) for path in (tmp_path / "sent").rglob("*") if path.is_file()}
    assert copied == set(sent)


def test_letters_of_either_case_and_nothing_without_an_ending(project: Path, tmp_path: Path) -> None:
    for name in ("HF_TOKEN.txt", "Passwords.yaml", "Makefile"):
        (project / name).write_text("x\n")
    assert not {"HF_TOKEN.txt", "Passwords.yaml", "Makefile"} & set(stage(project, tmp_path / "sent"))


def test_a_package_with_the_name_of_a_folder_that_stays_goes_along(project: Path, tmp_path: Path) -> None:
    (project / "data/__init__.py").write_text("")
    (project / "own/checkpoints/__init__.py").write_text("")
    (project / "cluster").mkdir()
    (project / "cluster/mine.yaml").write_text("x: 1\n")  # no package: ours of this name goes along with it
    sent = stage(project, tmp_path / "sent")
    assert {"data/__init__.py", "own/checkpoints/a.yaml", "cluster/mine.yaml", "cluster/cli.py"} <= set(sent)
    assert "data/train.arrow" not in sent


def test_a_package_that_would_hide_one_of_ours_is_refused(project: Path, tmp_path: Path) -> None:
    (project / "cluster").mkdir()
    (project / "cluster/__init__.py").write_text("")
    with pytest.raises(ConfigError, match=r"/cluster: got a package that would take the place of this project's; "):
        stage(project, tmp_path / "sent")


def test_too_much_is_refused_and_the_largest_named(project: Path, tmp_path: Path) -> None:
    (project / "words.txt").write_bytes(b"x" * (LARGEST + 1))
    with pytest.raises(ConfigError, match=r"2[01] MiB of code .* the largest is words.txt; allowed: 20 MiB"):
        stage(project, tmp_path / "sent")


def test_this_project_travels_in_less_than_two_mebibytes(tmp_path: Path) -> None:
    sent = stage(ROOT, tmp_path)
    assert {name.split("/")[0] for name in sent} == {
        "actors",
        "cluster",
        "configs",
        "examples",
        "learner",
        "mkdocs.yml",
        "pyproject.toml",
        "uniapl",
    }
    assert {"uniapl/data/reader.py", "uniapl/report/report.css", "cluster/cli.py", "configs/local.yaml"} <= set(sent)
    assert sum(sent.values()) < 2 << 20


def test_what_rays_own_command_takes_along(project: Path, tmp_path: Path) -> None:
    """`ray job submit --working-dir .` obeys .rayignore; the packaging is Ray's."""
    from ray._private.runtime_env.packaging import create_package

    (project / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    package = tmp_path / "package.zip"
    create_package(str(project), package, include_gitignore=True)
    with zipfile.ZipFile(package) as sent:
        names = sorted(name for name in sent.namelist() if not name.endswith("/"))
    assert names == GO


@pytest.fixture
def config(tmp_path: Path, tiny: Path) -> Path:
    return toy_config(tmp_path / "toy", tiny)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", *words]) == 2
    return capsys.readouterr().err.strip()


def test_a_configuration_elsewhere_does_not_go_along(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path / "toy" / "runs" if (tmp_path / "toy" / "runs").is_dir() else ROOT / "configs")
    line = told(capsys, str(config))
    assert line.startswith(f"{config}: does not go along; allowed: a file below the current folder")


def test_relative_paths_are_refused_before_anything_is_sent(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(config.parent)
    lines = told(capsys, config.name, "run.folder=runs", "data.train=[train-*.arrow]").splitlines()
    allowed = "allowed in a job: an absolute path, on storage that all nodes share, or a URL of an object store"
    assert lines == [f"run.folder: got 'runs'; {allowed}", f"data.train: got 'train-*.arrow'; {allowed}"]


def test_a_cluster_that_does_not_answer_is_one_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(config.parent)
    line = told(capsys, config.name, "--address=http://127.0.0.1:9")
    assert len(line.splitlines()) == 1
    assert line.startswith("--address: got 'http://127.0.0.1:9', ")


def test_a_wrong_configuration_is_told_here(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(config.parent)
    assert told(capsys, config.name, "learner.ranks=0") == "override: learner.ranks: got 0; allowed: a whole number > 0"
