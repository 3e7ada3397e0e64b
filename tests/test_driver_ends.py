"""How a run ends that cannot begin: with its own line, whatever else goes wrong at the end, or by SIGTERM."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import start
from helpers_toy import toy_config

from cluster import cli, run
from uniapl.config_errors import ConfigError


def ending(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    """`do` in the place of starting Ray, which has no part in what comes after it."""

    def session(*_: Any) -> Any:
        do()
        return nullcontext()

    monkeypatch.setattr(run, "ray_session", session)


def fail() -> None:
    raise ConfigError("the error that counts")


def test_a_report_that_cannot_be_written_does_not_hide_why_the_run_ended(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = toy_config(tmp_path, tiny, evaluation={"prompts": 0})
    (tmp_path / "runs" / "toy" / "eval").mkdir(parents=True)
    (tmp_path / "runs" / "toy" / "eval" / "before.json").write_text("no evaluation")
    ending(monkeypatch, fail)
    with pytest.warns(UserWarning, match=r"^report: .*before\.json"):
        assert cli.main(["train", str(place), "--resume"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "the error that counts"


def test_sigterm_before_anything_is_started_is_a_clean_end_too(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = toy_config(tmp_path, tiny, evaluation={"prompts": 0})
    ending(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["train", str(place)]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "ended by SIGTERM; there is no checkpoint to go on from"
    assert (tmp_path / "runs" / "toy" / "report.html").is_file()


def taken(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def importing(pid: int) -> bool:
    return "libarrow" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize(
    ("when", "kept"), [(taken, "nothing had begun"), (importing, "there is no checkpoint to go on from")]
)
def test_sigterm_in_the_first_moments_is_a_clean_end(
    tmp_path: Path, tiny: Path, when: Callable[[int], bool], kept: str
) -> None:
    process = start(toy_config(tmp_path, tiny))
    while not when(process.pid):
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, f"ended by SIGTERM; {kept}\n")
    assert not (tmp_path / "runs").exists()
