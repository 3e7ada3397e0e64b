"""Checkpoints that are torn, tampered with or another run's; run folders that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_bad_input import complaint
from helpers_toy import toy_config

from cluster.checkpoints import MANIFEST, newest_checkpoint, save_checkpoint
from cluster.run_folder import open_run
from uniapl.config import load_config
from uniapl.config_errors import ConfigError


def write(place: Path) -> None:
    (place / "zero").mkdir()
    (place / "zero" / "state.bin").write_bytes(b"weights")
    (place / "queue.json").write_text("{}")


def manifest(place: Path, **changes: Any) -> None:
    told = json.loads((place / MANIFEST).read_text())
    (place / MANIFEST).write_text(json.dumps(told | changes))


def with_file(place: Path, name: str) -> None:
    told = json.loads((place / MANIFEST).read_text())["files"]
    manifest(place, files=told | {name: told["queue.json"]})


def linked(place: Path) -> None:
    (place / "queue.json").rename(place.parent / "elsewhere.json")
    (place / "queue.json").symlink_to(place.parent / "elsewhere.json")


# name: (what is done to the checkpoint, what is said of it)
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "manifest missing": (lambda p: (p / MANIFEST).unlink(), "not whole (FileNotFoundError: "),
    "manifest empty": (lambda p: (p / MANIFEST).write_text(""), "not whole (JSONDecodeError: "),
    "manifest a list": (lambda p: (p / MANIFEST).write_text("[]"), "not whole (TypeError: "),
    "manifest no UTF-8": (lambda p: (p / MANIFEST).write_bytes(b"\xff"), "not whole (UnicodeDecodeError: "),
    "manifest deep": (lambda p: (p / MANIFEST).write_text("[" * 99_999), "not whole (RecursionError: "),
    "manifest a folder": (
        lambda p: ((p / MANIFEST).unlink(), (p / MANIFEST).mkdir()),
        "not whole (IsADirectoryError: ",
    ),
    "without files": (lambda p: manifest(p, files={}), "'queue.json' was not written by the run"),
    "files a number": (lambda p: manifest(p, files=3), "not whole (TypeError: "),
    "fingerprint a number": (
        lambda p: manifest(p, files={"queue.json": 3, "zero/state.bin": 3}),
        "queue.json is not what was written",
    ),
    "of another step": (lambda p: manifest(p, step=7), "its manifest is of step 7"),
    "step a text": (lambda p: manifest(p, step="4"), "not whole (ValueError: "),
    "a file that leads out": (lambda p: with_file(p, "../../../x"), "'../../../x' is missing"),
    "a file of the machine": (lambda p: with_file(p, "/etc/passwd"), "'/etc/passwd' is missing"),
    "a file with an escape": (lambda p: with_file(p, "\x1b[2J"), r"'\x1b[2J' is missing"),
    "a file more": (lambda p: (p / "zero" / "more.pt").write_text("x"), "'zero/more.pt' was not written by the run"),
    "a file less": (lambda p: (p / "queue.json").unlink(), "'queue.json' is missing"),
    "a file shorter": (lambda p: (p / "queue.json").write_text("{"), "queue.json is not what was written"),
    "one bit of a file": (
        lambda p: (p / "zero" / "state.bin").write_bytes(b"weighuS"),
        "zero/state.bin is not what was written",
    ),
    "a link in a file's place": (linked, "queue.json is not what was written"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, case: str) -> None:
    damage, expected = DAMAGES[case]
    good, bad = (save_checkpoint(tmp_path, step, 9, write) for step in (2, 4))
    damage(bad)
    with pytest.warns(UserWarning) as warned:
        assert newest_checkpoint(tmp_path) == (2, good)
    [warning] = warned
    said = str(warning.message)
    assert said.startswith(f"{bad}: {expected}") and said.endswith("; an older checkpoint is used") and "\n" not in said


@pytest.mark.parametrize("name", ["step-", "step-x", "step--4", "step-00004.partial", "step-4e4", "../step-00009"])
def test_a_folder_of_another_name_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    good = save_checkpoint(tmp_path, 2, 9, write)
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == (2, good)


CHANGES = {
    "run.seed=5": "run.seed: got 5; allowed: 0 as in {}: data order and samples follow from it",
    "objective.adversarial={weight: 0.1, discriminator: embedding}": "objective.adversarial.discriminator: "
    "got 'embedding'; allowed: 'none' as in {}: the checkpoint holds what was trained",
}


@pytest.mark.parametrize("override", CHANGES)
def test_a_run_goes_on_only_as_it_began(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    path = toy_config(tmp_path, tiny)
    folder = open_run(load_config(path), resume=False)
    assert open_run(load_config(path, [override]), resume=True) == folder, "there is no checkpoint yet"
    open_run(load_config(path), resume=True)
    save_checkpoint(folder, 4, 2, write)
    assert complaint(capsys, "train", path, "--resume", override) == CHANGES[override].format(folder)
    assert open_run(load_config(path, ["run.steps=20", "learner.learning_rate=0.1"]), resume=True) == folder


def test_the_configuration_of_a_run_that_was_edited(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = toy_config(tmp_path, tiny)
    folder = open_run(load_config(path), resume=False)
    save_checkpoint(folder, 4, 2, write)
    (folder / "config.yaml").write_text("run: [")
    said = complaint(capsys, "train", path, "--resume")
    assert said.startswith(f"{folder}/config.yaml: line 1: not valid YAML: ")


@pytest.mark.parametrize(("folder", "why"), [("file", "Not a directory"), ("x" * 300, "File name too long")])
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], folder: str, why: str
) -> None:
    (tmp_path / "file").write_text("")
    path = toy_config(tmp_path, tiny)
    said = complaint(capsys, "train", path, f"run.folder={tmp_path / folder}")
    assert said == f"run.folder: {tmp_path / folder}/toy: {why}; allowed: a folder that can be written"


def test_a_link_to_itself_is_no_folder(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=r"^run\.folder: .*loop/toy: .*; allowed: a folder that can be written$"):
        open_run(load_config(toy_config(tmp_path, tiny), [f"run.folder={tmp_path / 'loop'}"]), resume=False)


REPORTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no run": (lambda f: (f / "config.yaml").unlink(), "{}: holds no config.yaml; allowed: the folder of a run, such"),
    "metrics no JSON": (lambda f: (f / "metrics.jsonl").write_text("{\n"), "{}/metrics.jsonl line 1: not valid JSON"),
    "metrics of NaN": (
        lambda f: (f / "metrics.jsonl").write_text('{"step": 1, "a": NaN}\n'),
        "{}/metrics.jsonl line 1: not valid JSON",
    ),
    "metrics of text": (
        lambda f: (f / "metrics.jsonl").write_text('{"step": 1, "a": "x"}\n'),
        "{}/metrics.jsonl line 1: a is 'x'; allowed: a finite number",
    ),
    "evaluation torn": (lambda f: (f / "eval" / "before.json").write_text("{"), "{}/eval/before.json"),
    "evaluation a list": (lambda f: (f / "eval" / "before.json").write_text("[]"), "{}/eval/before.json"),
    "evaluation of nothing": (lambda f: (f / "eval" / "before.json").write_text("{}"), "{}/eval/before.json"),
    "configuration torn": (lambda f: (f / "config.yaml").write_text("run: ["), "{}/config.yaml"),
    "configuration no UTF-8": (lambda f: (f / "config.yaml").write_bytes(b"\xff"), "{}/config.yaml"),
    "versions torn": (lambda f: (f / "versions.json").write_text("{"), "{}/versions.json"),
}


@pytest.mark.parametrize("case", REPORTS)
def test_a_report_of_a_damaged_run(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    spoil, expected = REPORTS[case]
    folder = open_run(load_config(toy_config(tmp_path, tiny)), resume=False)
    spoil(folder)
    assert complaint(capsys, "report", folder).startswith(expected.format(folder))
