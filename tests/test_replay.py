"""`uniapl replay` of a step that failed, and what of a run's folder it does not believe or cannot use."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from helpers_replay import uniapl_replay
from helpers_zero import WEIGHTED, batch, config

from cluster.replay import replay
from cluster.replay_steps import find_steps
from cluster.run_folder import save_batch
from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.data.errors import DataError
from uniapl.objective.controllers import Controllers
from uniapl.recorded import read_recorded, recorded_table
from uniapl.records import MixedBatch, Sample
from uniapl.runlog import RunLog

PLAIN = WEIGHTED | {
    "preference": {"weight": 0.7, "advantage_std": False},
    "adversarial": {"weight": 0.2, "discriminator": "cotrained", "cotrained": {"warmup_steps": 0}},
}


def run_folder(place: Path, c: Config, kept: list[int], failed: list[int], checkpoints: list[int] = []) -> Path:  # noqa: B006
    """A run whose batches of these steps, from 1, are there, and as many lines of metrics; checkpoints are empty."""
    log = RunLog(place, tensorboard=False)
    for step in range(1, max(kept, default=0) + 1):
        log.log(step, {"loss/total": 1.0})
    log.close()
    (place / "config.yaml").write_text(yaml.safe_dump(c.model_dump(mode="json")))
    weights = Controllers(c.objective).weights
    for part, steps in (("batches", kept), ("failed", failed)):
        for step in steps:
            save_batch(place, batch(step - 1, huge=1e40 if part == "failed" else 0.0), c, weights(step - 1), part)
    for step in checkpoints:
        (place / "checkpoints" / f"step-{step:05d}").mkdir(parents=True)
    return place


def test_a_step_that_failed_fails_again_names_who_is_to_blame_and_not_with_another_value(
    tmp_path: Path, tiny: Path
) -> None:
    run = run_folder(tmp_path / "run", config(str(tiny), PLAIN), kept=[], failed=[1])
    status, out = uniapl_replay(run, "1", "objective.preference.advantage_std=true")
    assert status == 0
    assert "replayed: the loss is not finite; samples" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == [f"p1/{i}" for i in range(4)]
    assert "p1/0  reward 1e+40  expert score 0  advantage of preference 7.5e+39" in out
    assert out.rstrip().endswith("step 1: not finite, as in the run")
    changed = next(line.split() for line in out.splitlines() if line.startswith("loss/total"))
    assert math.isfinite(float(changed[1]))


def test_what_was_recorded_comes_back(tmp_path: Path, tiny: Path) -> None:
    c, whole = config(str(tiny)), batch(4)
    whole.groups[1].prompt = dataclasses.replace(whole.groups[1].prompt, expert_ids=[4, 5])
    weights = {"preference": 0.1, "demonstration": 0.30000000000000004, "adversarial": 0.0, "kl": 0.0}
    found = read_recorded(save_batch(tmp_path, whole, c, weights, "batches"))
    assert (found.config, found.weights, found.batch.step) == (c, weights, 4)
    assert found.batch.demonstrations == whole.demonstrations
    assert [_sequences(group) for group in found.batch.groups] == [_sequences(group) for group in whole.groups]


def _sequences(group: Any) -> tuple[Any, ...]:
    def of(sample: Sample) -> tuple[Any, ...]:
        logprobs = [pytest.approx(value, abs=1e-6) for value in sample.logprobs]
        return sample.token_ids, logprobs, sample.versions, sample.score

    return group.lease_id, group.prompt.id, group.prompt.token_ids, group.prompt.expert_ids, *map(of, group.samples)


@pytest.mark.parametrize(
    ("kept", "checkpoints", "step", "allowed"),
    [
        ([1, 2, 3], [], 4, "1 to 3,"),
        ([3, 4, 7, 8], [2, 5], 1, "3 to 4,"),
        ([3, 4, 7, 8], [2, 6], 9, "3 to 4, 7 to 8,"),
        ([], [4], 1, "none,"),
    ],
)
def test_a_step_that_is_not_there_tells_which_are(
    tmp_path: Path, tiny: Path, kept: list[int], checkpoints: list[int], step: int, allowed: str
) -> None:
    run = run_folder(tmp_path, config(str(tiny)), kept, [], checkpoints)
    with pytest.raises(ConfigError, match=rf"STEP: got {step}; allowed: {allowed}"):
        find_steps(run, step)


def test_batches_after_the_last_logged_step_are_of_a_life_that_was_undone(tmp_path: Path, tiny: Path) -> None:
    run = run_folder(tmp_path, config(str(tiny)), [1, 2], [])
    weights = Controllers(config(str(tiny)).objective).weights(2)
    save_batch(run, batch(2), config(str(tiny)), weights)
    with pytest.raises(ConfigError, match=r"STEP: got 3; allowed: 1 to 2,"):
        find_steps(run, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.lr=1", "learner.lr: unknown key"),
        ("rollout.actors=2", "rollout.actors: changes nothing in a recorded step; allowed: objective, "),
        ("learner.betas=[0.1, 0.2]", "the optimizer is restored with it"),
        ("objective.kl.weight=0", "is the recorded value; allowed: another one"),
        ("objective.kl={weight: 0.1, reference: gone}", "objective.kl.reference: got 'gone'; allowed: a Hugging Face"),
    ],
)
def test_a_value_that_cannot_be_changed_is_one_line(tmp_path: Path, tiny: Path, override: str, message: str) -> None:
    run = run_folder(tmp_path, config(str(tiny)), [1], [])
    with pytest.raises(ConfigError) as error:
        replay(run, 1, override, failed=False, stop=False, note=print)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([384], "the batch holds token 384; allowed: < 384"), ([1] * 5000, "row_tokens: got 4096; allowed: >= 500")],
)
def test_tokens_that_the_model_does_not_have_or_the_rows_do_not_hold(
    tmp_path: Path, tiny: Path, ids: list[int], message: str
) -> None:
    c = config(str(tiny))
    run = run_folder(tmp_path, c, [1], [])
    whole = batch()
    broken = dataclasses.replace(whole, demonstrations=[dataclasses.replace(whole.demonstrations[0], response_ids=ids)])
    save_batch(run, broken, c, Controllers(c.objective).weights(0))
    with pytest.raises((ConfigError, DataError), match=message):
        replay(run, 1, None, failed=False, stop=False, note=print)


def _table(tiny: Path) -> pa.Table:
    c = config(str(tiny))
    return recorded_table(batch(), c, Controllers(c.objective).weights(0))


def _edited(table: pa.Table, **values: Any) -> pa.Table:
    """With other values in the first row."""
    rows = table.to_pylist()
    rows[0] |= values
    return pa.Table.from_pylist(rows, schema=table.schema)


DAMAGES = {
    "no Arrow file": lambda t: b"{}",
    "cut off": lambda t: _bytes(t)[:-200],
    "lacks the columns expert_ids": lambda t: _bytes(t.drop_columns(["expert_ids"])),
    "no configuration and weights": lambda t: _bytes(t.replace_schema_metadata({})),
    "another version of uniapl": lambda t: _bytes(
        t.replace_schema_metadata(t.schema.metadata | {b"uniapl.config": b"{}"})
    ),
    "weights": lambda t: _bytes(t.replace_schema_metadata(t.schema.metadata | {b"uniapl.weights": b'{"kl": 1}'})),
    "log-probabilities": lambda t: _bytes(_edited(t, logprobs=[0.5, 0.5])),
    "token ids": lambda t: _bytes(_edited(t, prompt_ids=[-1])),
    "no finite number": lambda t: _bytes(_edited(t, reward=float("nan"))),
    "not what a run writes": lambda t: _bytes(_edited(t, versions=None)),
    "another kind or order": lambda t: _bytes(_edited(t, kind="other")),
}


def _bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_what_a_run_writes_is_one_line(tmp_path: Path, tiny: Path, damage: str) -> None:
    path = tmp_path / "step-00000.arrow"
    path.write_bytes(DAMAGES[damage](_table(tiny)))
    with pytest.raises(DataError) as error:
        read_recorded(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert damage in ("no Arrow file", "cut off") or damage in str(error.value)


def test_the_weights_of_the_changed_step() -> None:
    """A weight that follows a measurement stays where it was; one that was changed is what was asked for."""
    from cluster.replay import _changed
    from uniapl.recorded import Recorded

    followed = {"kind": "lagrangian", "value": 0.5}
    objective = {"demonstration": {"weight": followed}, "preference": {"weight": {"kind": "complement"}}}
    c = config("m", objective)
    recorded = Recorded(MixedBatch(3, [], []), c, {"preference": 0.2, "demonstration": 0.8, "adversarial": 0, "kl": 0})
    assert _changed(recorded, "objective.kl.weight=0.1").weights == pytest.approx(recorded.weights | {"kl": 0.1})
    other = _changed(recorded, "objective.demonstration.weight.value=0.6")
    assert other.weights == {"preference": 0.4, "demonstration": 0.6, "adversarial": 0.0, "kl": 0.0}
