"""metrics.jsonl: what is logged can be read back, after a crash and after a resume as well."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from uniapl.runlog import RunError, RunLog, read_metrics


def steps(run_dir):
    return [record["step"] for record in read_metrics(run_dir)]


def log_steps(run_dir, numbers, tensorboard=False):
    log = RunLog(run_dir, tensorboard)
    for number in numbers:
        log.log(number, {"reward/mean": number / 10})
    return log


def tensorboard_scalars(run_dir, key):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(key)}


def test_each_step_is_readable_as_soon_as_it_is_logged(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.log(1, {"reward/mean": 0.25, "loss/total": -1})
    [record] = read_metrics(tmp_path)
    assert record["reward/mean"] == 0.25 and record["loss/total"] == -1.0
    assert record["time"] > 1.7e9


def test_a_time_given_by_the_caller_is_kept(tmp_path):
    RunLog(tmp_path, tensorboard=False).log(1, {"time": 12.5})
    assert read_metrics(tmp_path) == [{"step": 1, "time": 12.5}]


def test_the_step_is_the_one_logged_whatever_the_metrics_say(tmp_path):
    RunLog(tmp_path, tensorboard=False).log(4, {"step": 3.0})
    assert steps(tmp_path) == [4]


def test_a_run_without_metrics_reads_as_empty(tmp_path):
    assert read_metrics(tmp_path) == []
    RunLog(tmp_path, tensorboard=False).close()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None, "high"])
def test_what_is_no_finite_number_is_refused_by_name_and_nothing_is_written(tmp_path, value):
    log = log_steps(tmp_path, [1])
    with pytest.raises(RunError, match=r"step 2: metric 'loss/total' is .*; allowed: a finite number"):
        log.log(2, {"reward/mean": 0.5, "loss/total": value})
    assert steps(tmp_path) == [1]


def test_numbers_of_numpy_and_torch_are_written_as_numbers(tmp_path):
    import numpy
    import torch

    RunLog(tmp_path, tensorboard=False).log(1, {"a": numpy.float32(0.5), "b": torch.tensor(2.0)})
    [record] = read_metrics(tmp_path)
    assert (record["a"], record["b"]) == (0.5, 2.0)


def test_a_torn_last_line_is_dropped_with_a_warning(tmp_path):
    log_steps(tmp_path, [1, 2]).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: the last line is unfinished"):
        assert steps(tmp_path) == [1, 2]


def test_logging_goes_on_cleanly_behind_a_torn_line(tmp_path):
    log_steps(tmp_path, [1]).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    with pytest.warns(UserWarning, match="unfinished"):
        log = RunLog(tmp_path, tensorboard=False)
    log.log(2, {"reward/mean": 0.5})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2]


@pytest.mark.parametrize(
    "line", ["not json", "[1]", '{"reward/mean": 1}', '{"step": 1, "x": NaN}', '{"step": 1, "x": "a"}']
)
def test_a_damaged_line_elsewhere_is_an_error_that_names_it(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl line 2: .*allowed: "):
        read_metrics(tmp_path)


def test_truncate_after_drops_the_steps_that_will_be_made_again(tmp_path):
    log = log_steps(tmp_path, [1, 2, 3, 4])
    log.truncate_after(2)
    assert steps(tmp_path) == [1, 2]
    log.log(3, {"reward/mean": 9.0})
    assert read_metrics(tmp_path)[-1]["reward/mean"] == 9.0


def test_truncate_after_before_the_first_step_empties_the_log(tmp_path):
    log = log_steps(tmp_path, [1, 2])
    log.truncate_after(0)
    assert steps(tmp_path) == []


def test_a_step_may_not_be_logged_twice(tmp_path):
    log = log_steps(tmp_path, [1, 2])
    with pytest.raises(RunError, match="step 2 logged after step 2; allowed: rising steps"):
        log.log(2, {})


def test_tensorboard_shows_the_same_scalars(tmp_path):
    log_steps(tmp_path, [1, 2], tensorboard=True).close()
    assert tensorboard_scalars(tmp_path, "reward/mean") == {1: pytest.approx(0.1), 2: pytest.approx(0.2)}


def test_tensorboard_forgets_the_steps_dropped_by_a_resume(tmp_path):
    log_steps(tmp_path, [1, 2, 3], tensorboard=True).close()
    log = RunLog(tmp_path, tensorboard=True)
    log.truncate_after(1)
    log.log(2, {"reward/mean": 5.0})
    log.close()
    assert tensorboard_scalars(tmp_path, "reward/mean") == {1: pytest.approx(0.1), 2: 5.0}
