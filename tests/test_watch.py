"""Following a run's folder while it is written, and while it is resumed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.job_submission import JobStatus

from cluster import watch
from cluster.cli import main
from cluster.job import RUN_FOLDER
from cluster.watch import follow
from uniapl.runlog import RunError, RunLog

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


def test_a_run_that_failed_ends_it_and_one_that_goes_on_does_not(run: Path) -> None:
    log = RunLog(run, tensorboard=False)
    write(log, 1, 3)
    log.close(failed=True)
    steps = follow(run)
    assert [next(steps)["step"] for _ in range(3)] == [1, 2, 3]
    with pytest.raises(RunError, match="the run ended at step 3 of 6; what it printed tells why"):
        next(steps)
    log = RunLog(run, tensorboard=False)
    steps = follow(run)
    write(log, 4, STEPS)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    log.close(failed=True)  # such as by SIGTERM while the model is written: all steps are there
    assert [record["step"] for record in follow(run)] == list(range(1, STEPS + 1))


class Jobs:
    """A cluster's jobs, as far as `uniapl watch ADDRESS` asks: a real one would have to be caught while it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, bool] = {"run": True}
        self.polls = 0

    def list_jobs(self) -> list[Any]:
        return [SimpleNamespace(metadata={RUN_FOLDER: str(self.folder)}, start_time=1, submission_id="run")]

    def submit_job(self, entrypoint: str, **_: Any) -> str:
        self.polls += 1
        self.running["poll"] = True
        return "poll"

    async def tail_job_logs(self, job: str) -> Any:
        self.failed = not (self.folder / "config.yaml").exists()
        if self.failed:
            yield f"{self.folder}: holds no config.yaml; allowed: the folder of a run\n"
            if self.polls == 2:  # the run has made its folder meanwhile
                (self.folder / "config.yaml").touch()
        else:
            yield '{"step": 1, "st'
            yield 'eps": 1}\n'

    def get_job_status(self, job: str) -> Any:
        ended = JobStatus.FAILED if self.failed else JobStatus.SUCCEEDED
        return JobStatus.RUNNING if job == "run" and self.running["run"] else ended

    def stop_job(self, job: str) -> None:
        assert job == "poll"

    def delete_job(self, job: str) -> None:
        del self.running[job]


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    made = Jobs(tmp_path)
    monkeypatch.setattr(watch, "job_client", lambda address: made)
    return made


def test_a_run_that_was_only_just_submitted_is_waited_for(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "http://127.0.0.1:1", "--json"]) == 0
    assert capsys.readouterr().out == '{"step": 1, "steps": 1}\n'
    assert (jobs.polls, jobs.running) == (3, {"run": True})  # no job of ours is left there


def test_but_not_one_whose_job_has_ended(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.running["run"] = False
    assert main(["watch", "http://127.0.0.1:1", "--json"]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err
    assert (jobs.polls, jobs.running) == (1, {"run": False})


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "nothing")


def test_no_run_is_one_line(nowhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", nowhere]) == 2
    line = capsys.readouterr().err.strip()
    assert line == f"{nowhere}: holds no config.yaml; allowed: the folder of a run, such as runs/local"
