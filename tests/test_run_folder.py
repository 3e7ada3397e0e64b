"""A run's folder: its configuration may change in what does not matter, batches are kept as consumed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest
from helpers_cli import ROOT

from cluster.changes import FIXED, check_changes
from cluster.run_folder import open_run, save_batch
from uniapl.config import Config, load_config
from uniapl.config_errors import ConfigError
from uniapl.records import BATCH_SCHEMA, Demonstration, MixedBatch


def config(folder: Path, name: str = "a") -> Config:
    return Config.model_validate(
        {
            "run": {"name": name, "folder": str(folder)},
            "model": {"path": "m"},
            "data": {"train": ["t"], "heldout": ["h"]},
        }
    )


def test_a_new_run_has_its_configuration_and_versions(tmp_path: Path) -> None:
    run = open_run(config(tmp_path), resume=False)
    assert load_config(run / "config.yaml") == config(tmp_path)
    versions = json.loads((run / "versions.json").read_text())
    assert versions.keys() >= {"torch", "ray", "deepspeed", "transformers", "pyarrow"}
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert versions["uniapl commit"].removesuffix("-dirty") == head.stdout.strip()


def test_an_existing_run_wants_resume_or_another_name(tmp_path: Path) -> None:
    open_run(config(tmp_path), resume=False)
    with pytest.raises(ConfigError) as error:
        open_run(config(tmp_path), resume=False)
    assert str(error.value) == (
        f"run.name: {tmp_path / 'a'} is there already; allowed: another name, or --resume to go on"
    )
    assert open_run(config(tmp_path), resume=True) == tmp_path / "a"


def changed(path: str, value: object) -> Config:
    tree = config(Path("runs")).model_dump()
    node = tree
    *parents, key = path.split(".")
    for part in parents:
        node = node[part]
    node[key] = value
    return Config.model_validate(tree)


REFUSED = [
    ("run.seed", 1, "0", "data order and samples follow from it"),
    ("model.path", "n", "'m'", "the checkpoint holds this model's weights"),
    ("data.train", ["u"], "['t']", "the cursors stand in these shards"),
    ("data.on_bad_row", "skip", "'error'", "the cursors count these rows"),
    ("data.max_prompt_tokens", 256, "512", "the cursors count these rows"),
    ("data.max_response_tokens", 256, "512", "the cursors count these rows"),
    ("rollout.group_size", 8, "4", "groups that stand ready are of this size"),
    ("queue.groups_per_step", 4, "8", "the cursors stand between such batches"),
    ("queue.demonstrations_per_step", 4, "16", "the cursors stand between such batches"),
    ("objective.adversarial.discriminator", "embedding", "'none'", "the checkpoint holds what was trained"),
    ("objective.adversarial.cotrained.learning_rate", 0.5, None, "the discriminator's optimizer is restored with it"),
    ("learner.dtype", "float32", "'bfloat16'", "the optimizer's state is laid out for it"),
    ("learner.betas", [0.9, 0.99], "[0.9, 0.95]", "the optimizer is restored with it"),
    ("learner.weight_decay", 0.1, "0.0", "the optimizer is restored with it"),
]
ALLOWED = [
    ("run.steps", 40),
    ("run.checkpoint_every", 3),
    ("run.keep_last", 5),
    ("rollout.actors", 2),
    ("learner.ranks", 2),
    ("learner.learning_rate", 0.5),
    ("logging.tensorboard", False),
    ("cluster.step_timeout_s", 5.0),
]


def test_every_key_that_cannot_change_is_refused_in_one_line() -> None:
    before = config(Path("runs")).model_dump(mode="json")
    for key, value, old, why in REFUSED:
        with pytest.raises(ConfigError) as error:
            check_changes(before, changed(key, value).model_dump(mode="json"), "runs/a")
        expected = f"{key}: got {value!r}; allowed: {old} as in runs/a: {why}"
        assert str(error.value) == expected if old else str(error.value).startswith(f"{key}: got {value!r}; ")
        assert "\n" not in str(error.value)
    assert {key for key, *_ in REFUSED} | {"objective.adversarial.cotrained"} >= FIXED.keys()


@pytest.mark.parametrize(("key", "value"), ALLOWED)
def test_other_keys_may_change_and_are_named(key: str, value: object) -> None:
    before = config(Path("runs")).model_dump(mode="json")
    [line] = check_changes(before, changed(key, value).model_dump(mode="json"), "runs/a")
    assert line.startswith(f"{key}: ")
    assert line.endswith(f"{value!r} from here on")
    assert check_changes(before, before, "runs/a") == []


def test_a_run_opened_again_compares_with_what_it_was_begun_with(tmp_path: Path) -> None:
    run = open_run(config(tmp_path), resume=False)
    other = config(tmp_path).model_copy(update={"run": config(tmp_path).run.model_copy(update={"seed": 7})})
    (run / "checkpoints" / "step-00002").mkdir()  # without any it begins anew
    with pytest.raises(ConfigError, match=r"run\.seed: got 7; allowed: 0 as in"):
        open_run(other, resume=True)
    assert load_config(run / "config.yaml") == config(tmp_path)
    longer = config(tmp_path).model_copy(update={"run": config(tmp_path).run.model_copy(update={"steps": 31})})
    with pytest.warns(UserWarning, match="run.steps: 30 before, 31 from here on"):
        open_run(longer, resume=True)
    assert load_config(run / "config.yaml") == longer


def test_batches_are_kept_whole(tmp_path: Path) -> None:
    run = open_run(config(tmp_path), resume=False)
    save_batch(run, MixedBatch(3, [], [Demonstration("d", [1], [2])]), config(tmp_path), {"kl": 0.0})
    assert [p.name for p in (run / "batches").iterdir()] == ["step-00003.arrow"]
    table = pa.ipc.open_file(run / "batches" / "step-00003.arrow").read_all()
    assert table.schema == BATCH_SCHEMA
    assert table.num_rows == 1
