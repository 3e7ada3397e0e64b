"""A run whose folder and data are on S3: its driver is killed, its machine's disk is lost, another machine goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers_cli import ROOT, killed, train
from helpers_outside import files_with
from helpers_s3 import SECRET, s3
from helpers_toy import toy_config

from uniapl import storage
from uniapl.config import load_config
from uniapl.runlog import read_metrics

pytestmark = pytest.mark.timeout(600)
STEPS = 3


@dataclass
class Story:
    """What was seen of three lives, the third of them with one learner rank in the place of two."""

    url: str
    first: Path
    second: Path
    third: Path
    output: str
    """Of the second."""
    last: str
    """Of the third."""
    held: dict[str, storage.Entry]
    """In the store when the first life was over."""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Story]:
    """Killed while the checkpoint of the last step is written, when the ones before are in the store."""
    folder = tmp_path_factory.mktemp("s3")
    with s3() as bucket:
        config = toy_config(
            folder,
            tiny,
            run={"name": "toy", "folder": f"{bucket}/runs", "steps": STEPS, "checkpoint_every": 1, "keep_last": 2},
            data={"train": [f"{bucket}/data/train-*.arrow"]},
            learner={"ranks": 2},
            evaluation={"prompts": 0},
        )
        shards = {path.name: path for path in folder.glob("train-*.arrow")}
        storage.upload_all(shards, f"{bucket}/data")
        for path in shards.values():
            path.unlink()
        sft = ("-m", str(ROOT / "configs" / "methods" / "sft.yaml"))
        url, (first, second, third) = f"{bucket}/runs/toy", (folder / name for name in ("first", "second", "third"))
        killed(config, f"save:{STEPS}:0", *sft, f"run.scratch={first}")
        held = storage.find(url)
        # The newest is changed on its way, and a later one was never finished.
        name = f"{url}/checkpoints/step-00002/controllers.json"
        storage.write(name, storage.read(name)[:-1] + b" ")
        storage.write(f"{url}/checkpoints/step-00009/queue.json", b"{}")
        metrics = folder / "metrics"
        shutil.copytree(load_config(config, [f"run.scratch={first}"]).run_dir, metrics)
        shutil.rmtree(first)
        output = train(config, *sft, f"run.scratch={second}", "--resume")
        alone = ("learner.ranks=1", f"run.steps={STEPS + 1}", f"run.scratch={third}")
        last = train(config, *sft, *alone, "--resume")
        runs = [load_config(config, [f"run.scratch={place}"]).run_dir for place in (second, third)]
        yield Story(url, metrics, *runs, output, last, held)


def test_the_store_holds_the_whole_run_as_far_as_it_counts(story: Story) -> None:
    names = {name.rpartition("/")[0] for name in story.held if name.startswith("checkpoints/")}
    assert names == {f"checkpoints/step-0000{n}{part}" for n in (1, 2) for part in ("", "/zero")}
    assert {"config.yaml", "versions.json", "metrics.jsonl", "batches/step-00001.arrow"} <= story.held.keys()
    assert not any("partial" in name or name.startswith(("nodes", ".store")) for name in story.held)


def test_the_next_machine_names_what_is_damaged_and_goes_on_from_what_is_whole(story: Story) -> None:
    assert "step-00009: not whole, manifest.json is missing; an older checkpoint is used" in story.output
    changed = "step-00002: controllers.json is not what was written; an older checkpoint is used"
    assert changed in story.output


def test_its_losses_are_those_of_the_run_that_was_killed(story: Story) -> None:
    """The first life had made every step when it was killed: it is the undisturbed run."""
    lives = [read_metrics(place) for place in (story.first, story.second)]
    assert [[m["step"] for m in metrics] for metrics in lives] == [[1, 2, 3], [1, 2, 3]]
    same = ("loss/total", "loss/demonstration", "learner/grad_norm", "expert/nll")
    assert [[m[key] for key in same] for m in lives[0]] == [[m[key] for key in same] for m in lives[1]]


def test_everything_is_in_the_store_at_the_end(story: Story) -> None:
    names = storage.find(story.url)
    kept = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
    assert kept == {"step-00003", "step-00004", "step-00009"}, "of what is not later than the newest, keep_last"
    assert {"report.html", "model/model.safetensors", "batches/step-00002.arrow"} <= names.keys()
    assert storage.read(f"{story.url}/metrics.jsonl") == (story.third / "metrics.jsonl").read_bytes()
    assert story.last.rstrip().endswith(f"report: {story.url}/report.html")


def test_another_number_of_learner_ranks_goes_on_by_a_universal_checkpoint_in_the_scratch_folder(story: Story) -> None:
    assert "step-00003 was saved by 2 learner ranks: DeepSpeed's universal checkpoint is made of it" in story.last
    second, third = (read_metrics(place) for place in (story.second, story.third))
    assert (third[:STEPS], [m["step"] for m in third]) == (second, [1, 2, 3, 4])
    assert third[-1]["expert/nll"] < third[-2]["expert/nll"] < third[0]["expert/nll"]
    assert not list(story.third.rglob("*.universal")) and not any(
        "universal" in name for name in storage.find(story.url)
    )


def test_no_credentials_are_written(story: Story) -> None:
    assert files_with(story.second, SECRET) == files_with(story.third, SECRET) == []
    assert SECRET not in story.output + story.last
