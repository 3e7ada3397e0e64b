"""Following a run's folder while it is written, and while it is resumed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.cli import main
from cluster.watch import follow
from uniapl.runlog import RunLog

STEPS = 6


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tree = {"run": {"steps": STEPS}, "model": {"path": "m"}, "data": {"train": ["t"], "heldout": ["h"]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def write(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.log(step, {"reward/mean": step / 10, "time/step": 2.0})
        time.sleep(0.05)


def test_steps_come_as_they_are_made_to_the_last(run: Path) -> None:
    log = RunLog(run, tensorboard=False)
    write(log, 1, 2)
    steps = follow(run)
    assert [next(steps)["step"], next(steps)["step"]] == [1, 2]
    writer = threading.Thread(target=write, args=(log, 3, STEPS))
    writer.start()
    assert [(record["step"], record["steps"]) for record in steps] == [(step, STEPS) for step in range(3, STEPS + 1)]
    writer.join()
    log.close()


def test_a_line_that_is_not_whole_yet_is_waited_for(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "rew')
    steps = follow(run)
    assert next(steps)["step"] == 1

    def rest() -> None:
        time.sleep(0.2)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('ard/mean": 1.0}\n')

    threading.Thread(target=rest).start()
    assert next(steps) == {"step": 2, "reward/mean": 1.0, "steps": STEPS}


def test_steps_that_a_resumed_run_makes_again_come_again(run: Path) -> None:
    log = RunLog(run, tensorboard=False)
    write(log, 1, 4)
    steps = follow(run)
    seen = [next(steps)["step"] for _ in range(4)]

    def go_on() -> None:
        time.sleep(0.7)
        log.truncate_after(2)
        time.sleep(0.7)
        write(log, 3, STEPS)

    resumed = threading.Thread(target=go_on)
    resumed.start()
    assert seen + [record["step"] for record in steps] == [1, 2, 3, 4, 3, 4, 5, 6]
    resumed.join()
    log.close()


def test_the_command_prints_a_line_for_each_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(run, tensorboard=False)
    write(log, 1, STEPS)
    log.close()
    assert main(["watch", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("] ")[1].split("  ")[0] for line in lines] == [f"step {n}/{STEPS}" for n in range(1, STEPS + 1)]


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "nothing")


def test_no_run_is_one_line(nowhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", nowhere]) == 2
    line = capsys.readouterr().err.strip()
    assert line == f"{nowhere}: holds no config.yaml; allowed: the folder of a run, such as runs/local"
