"""`uniapl export`: folder, model card, and what is refused. `test_end_to_end.py` exports a real run's checkpoints and
compares log-probabilities with the learner's, in transformers and in vLLM.

Shards are cut here as DeepSpeed lays them out, because a ZeRO-3 learner takes half a minute to start;
the whole run has DeepSpeed's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_run import write_run
from helpers_tiny import tiny_model
from helpers_toy import toy_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.checkpoints import save_checkpoint
from cluster.cli import main
from cluster.export import export_checkpoint
from cluster.run_folder import save_data_record
from learner.zero_files import TAG
from uniapl.analysis import Evaluation
from uniapl.model_card import model_card
from uniapl.policy import PREFIX
from uniapl.report import write_report

RANKS = 3


def write_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Masters of `RANKS` ranks, all parameters in one group."""
    folder.mkdir()
    shapes = {PREFIX + name: value.shape for name, value in weights.items()}
    torch.save({"param_shapes": [shapes]}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for rank in range(RANKS):
        pieces = []
        for value in weights.values():
            size = math.ceil(value.numel() / RANKS)
            padded = torch.nn.functional.pad(value.flatten(), (0, size * RANKS - value.numel()))
            pieces.append(padded[rank * size : (rank + 1) * size])
        state = {"optimizer_state_dict": {"fp32_flat_groups": [torch.cat(pieces)]}}
        torch.save(state, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def write_checkpoint(run: Path, step: int, model: Path, scale: float) -> Path:
    """A checkpoint that holds the model's weights times `scale`; returns its folder."""
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = {name: value.detach() * scale for name, value in source.named_parameters()}
    return save_checkpoint(run, step, 9, lambda place: write_shards(place / TAG, weights))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose output layer is its input embedding, which DeepSpeed saves once."""
    model = tiny_model(tmp_path_factory.mktemp("tied"), tied=True)
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    return model


@pytest.fixture(scope="module")
def run(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 4 and 8, without any process."""
    folder = tmp_path_factory.mktemp("export")
    config = toy_config(folder, tied)
    run = folder / "runs" / "toy"
    run.mkdir(parents=True)
    config.rename(run / "config.yaml")
    for step in (4, 8):
        write_checkpoint(run, step, tied, scale=step)
    return run


def test_the_folder_holds_the_weights_tokenizer_template_and_generation_config(run: Path, tied: Path) -> None:
    folder = export_checkpoint(run)
    assert folder == run / "export" / "step-00008"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.float32
    source = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    for name, value in source.named_parameters():
        assert torch.equal(model.get_parameter(name), value * 8), name
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == source.generation_config.eos_token_id is not None
    before, after = (AutoTokenizer.from_pretrained(place) for place in (tied, folder))
    chat = [{"role": "user", "content": "say the red fox"}]
    assert after.chat_template == before.chat_template
    assert after.apply_chat_template(chat)["input_ids"] == before.apply_chat_template(chat)["input_ids"]


def test_an_earlier_step_and_another_dtype(run: Path, tied: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "deep" / "model"
    assert main(["export", str(run), "--step", "4", "--out", str(out), "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": str(out)}
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    source = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    for name, value in source.named_parameters():
        assert torch.equal(model.get_parameter(name), (value * 4).bfloat16()), name
    assert "Weights: bfloat16, as the learner held them after 4 optimizer steps." in (out / "README.md").read_text()


def test_a_damaged_newest_checkpoint_is_passed_over(run: Path, tied: Path) -> None:
    place = write_checkpoint(run, 9, tied, scale=9)
    [shard, *_] = (place / TAG).glob("*_optim_states.pt")
    shard.write_bytes(shard.read_bytes()[:-1])
    try:
        with pytest.warns(UserWarning, match=f"{shard.name} is not what was written; an older checkpoint is used"):
            assert export_checkpoint(run).name == "step-00008"
    finally:
        place.rename(run / "step-00009-damaged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NONE"], "NONE: holds no config.yaml; allowed: the folder of a run, such as runs/local"),
        (["RUN", "--step", "5"], "--step: got 5; allowed: newest, or one that is there: 4, 8"),
        (["RUN", "--step", "last"], "--step: got last; allowed: newest, or one that is there: 4, 8"),
        (["RUN", "--out", "NONE"], "--out: NONE is there already; allowed: a new folder"),
    ],
)
def test_a_wrong_word_is_one_line(run: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str) -> None:
    places = {"NONE": str(tmp_path), "RUN": str(run)}
    assert main(["export", *(places.get(word, word) for word in arguments)]) == 2
    assert capsys.readouterr().err.strip() == message.replace("NONE", str(tmp_path))


def test_a_checkpoint_that_is_damaged_or_of_another_model_is_one_line(
    tied: Path, tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "runs" / "toy"
    run.mkdir(parents=True)
    toy_config(tmp_path, tied).rename(run / "config.yaml")
    assert main(["export", str(run)]) == 2
    assert capsys.readouterr().err.strip() == (
        f"{run}: no whole checkpoint; steps that are there: none, it wrote none; "
        "allowed: a run that has one; model/ is what a run wrote at its end"
    )
    other = write_checkpoint(run, 2, tiny, 1.0)
    assert main(["export", str(run)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(
        f"{other / TAG}: holds other parameters than {tied} has; allowed: what this run wrote, .*", line
    )
    (other / TAG / "more").touch()
    assert main(["export", str(run), "--step", "2"]) == 2
    assert re.match(rf"{other}: 'zero/more' was not written by the run; allowed", capsys.readouterr().err.strip())
    assert not (run / "export").exists() or not list((run / "export").iterdir())


def test_the_card_tells_method_data_with_checksums_results_versions_and_how_to_make_it_again(run: Path) -> None:
    card = model_card(run, 8, "float32")
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0"
    assert header["tags"] == ["uniapl", "post-training", "demonstration", "preference"]
    assert "model-index" not in header
    assert "| weights of the terms | preference: 0.5; demonstration: 0.5 |" in card
    assert "| batch | 8 prompts × 4 samples + 4 demonstrations |" in card
    rows = re.findall(r"\| (training|evaluation) \| `(\S+)` \| (\d+) \| `([0-9a-f]{64})` \|", card)
    assert [(use, Path(path).name) for use, path, _, _ in rows] == [
        ("training", "train-0.arrow"),
        ("training", "train-1.arrow"),
        ("evaluation", "heldout.arrow"),
    ]
    assert all(Path(path).stat().st_size == int(size) for _, path, size, _ in rows)
    assert "These weights were not evaluated by the run." in card
    assert "uniapl train config.yaml run.name=toy-again" in card
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0]) == yaml.safe_load((run / "config.yaml").read_text())


def test_the_card_of_a_finished_run_has_its_results_and_no_secret(tmp_path: Path) -> None:
    run = write_run(tmp_path / "local")
    card = model_card(run, 30, "bfloat16")
    [metric] = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["metrics"]
    after = json.loads((run / "eval" / "after.json").read_text())
    passed = [all(sample["checks"].values()) for sample in after["samples"]]
    assert metric["value"] == pytest.approx(sum(passed) / len(passed), abs=1e-4)
    assert re.search(r"\| before training \| 0 \| \d+\.\d% \| \d+\.\d% to \d+\.\d% \| 63 \|", card)
    assert re.search(r"\| this model \| 30 \| \d+\.\d% \| \d+\.\d% to \d+\.\d% \| 64 \|", card)
    assert "| `reward/mean` | " in card
    assert "| torch | 2.13.0 |" in card
    assert "| training | `data/train-*.arrow` | not there any more |  |" in card
    assert "user@cache" not in card
    assert "this model" not in model_card(run, 20, "bfloat16"), "those results are of step 30"


@pytest.mark.parametrize(("versions", "told"), [([20], True), ([20, 21], False)])
def test_an_evaluation_that_later_weights_had_a_part_in_is_none_of_this_model(
    tmp_path: Path, versions: list[int], told: bool
) -> None:
    run = write_run(tmp_path / "local")
    beside = dataclasses.replace(Evaluation.load(run / "eval" / "after.json"), step=20, versions=versions)
    beside.save(run / "eval" / "step-00020.json")
    assert ("this model" in model_card(run, 20, "bfloat16")) is told


def test_the_data_are_written_down_once_and_told_when_they_have_gone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "local")
    shard = tmp_path / "train-0.arrow"
    shard.write_bytes(b"rows")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("data/train-*.arrow", str(shard)))
    assert "checksums are written down at the end" in write_report(run).read_text()
    save_data_record(run)
    shard.unlink()
    digest = hashlib.sha256(b"rows").hexdigest()
    assert f"| training | `{shard}` | 4 | `{digest}` |" in model_card(run, 30, "bfloat16")
    page = write_report(run).read_text()
    assert f"<td>{shard}</td><td>4</td><td><code>{digest}</code></td>" in page
    assert "uniapl train config.yaml run.name=local-again" in page
