"""SmolLM2 as a Hugging Face folder, converted once, with the tokenizer mended; and what `make run` does with it."""

import ast
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers_cli import assert_memory_freed, shared_memory, start
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cluster.self_check import KL_BOUND
from uniapl.analysis import Evaluation
from uniapl.config import load_config
from uniapl.data.encoding import ChatEncoder
from uniapl.data.errors import DataError
from uniapl.data.local_model import is_whole, prepare_model
from uniapl.plan.fit import Machines
from uniapl.plan.pace import Rates
from uniapl.plan.plan import make_plan
from uniapl.runlog import read_metrics

ROOT = Path(__file__).parent.parent
STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_model(tmp_path_factory.mktemp("converted") / "smollm2")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("2026 and 17") == ["2", "0", "2", "6", "Ġand", "Ġ", "1", "7"]


def test_text_comes_back_unchanged(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in (
        "Hello, world!",
        "  two  spaces\n\nnew paragraph",
        "naïve café – 3,141 🙂",
        "* bullet\n* [name] <<x>>",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_template_opens_the_assistants_turn(folder: Path) -> None:
    encoder = ChatEncoder.from_folder(folder)
    text = encoder.tokenizer.decode(encoder.prompt_ids([{"role": "user", "content": "Hi"}]))
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_response_ends_with_one_end_of_turn_token(folder: Path) -> None:
    encoder = ChatEncoder.from_folder(folder)
    ids = encoder.response_ids("I say <|im_end|> twice <|im_end|>")
    assert encoder.tokenizer.decode([ids[-1]]) == "<|im_end|>"
    assert ids.count(encoder.end_of_turn) == 1


def test_padding_is_not_the_end_of_turn(
    folder: Path, tokenizer: PreTrainedTokenizerFast, model: torch.nn.Module
) -> None:
    """A mask made from padding ids would hide the token that teaches the model to stop."""
    assert tokenizer.eos_token_id == ChatEncoder.from_folder(folder).end_of_turn
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_no_module_reads_the_padding_id() -> None:
    """Masks come from lengths: with other tokenizers padding may well be the end-of-turn token."""
    readers = [
        str(path.relative_to(ROOT))
        for floor in ("uniapl", "actors", "learner", "cluster")
        for path in (ROOT / floor).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "pad_token_id" and isinstance(node.ctx, ast.Load)
    ]
    assert set(readers) <= {"uniapl/data/local_model.py"}


def test_the_model_is_whole_and_speaks(model: torch.nn.Module, folder: Path) -> None:
    encoder = ChatEncoder.from_folder(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert all(p.dtype == torch.float32 for p in model.parameters())
    prompt = encoder.prompt_ids([{"role": "user", "content": "What is the capital of France? Answer briefly."}])
    with torch.no_grad():
        assert model(torch.tensor([prompt])).logits.isfinite().all()
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert "Paris" in encoder.decode(answer.tolist())


def test_input_and_output_embeddings_are_one_tensor(model: torch.nn.Module) -> None:
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


def test_the_licence_stands_beside_the_weights(folder: Path) -> None:
    assert "Apache License, Version 2.0" in (folder / "LICENSE_NOTE.txt").read_text(encoding="utf-8")


def test_a_whole_folder_is_left_alone(folder: Path) -> None:
    before = (folder / "model.safetensors").stat()
    assert prepare_model(folder) == folder
    assert (folder / "model.safetensors").stat() == before
    assert os.listdir(folder.parent) == [folder.name]


def test_a_torn_folder_is_told_from_a_whole_one(folder: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn, copy_function=os.link)
    assert is_whole(torn)
    (torn / "model.safetensors").unlink()
    with (folder / "model.safetensors").open("rb") as whole:
        (torn / "model.safetensors").write_bytes(whole.read(1 << 20))
    assert not is_whole(torn)
    with pytest.raises(DataError, match=r"torn: exists but is not a whole model folder; allowed: a folder that is not"):
        prepare_model(torn)


class TestMakeRun:
    """`configs/local.yaml` as `make run` trains it, but with few steps of half the size and few evaluated prompts."""

    @pytest.fixture(scope="class")
    def run(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
        place, before = tmp_path_factory.mktemp("make-run"), shared_memory()
        few = [f"run.steps={STEPS}", "evaluation.prompts=4", "learner.warmup_steps=1", "run.name=few"]
        few += ["queue.groups_per_step=4", "queue.demonstrations_per_step=8", "learner.micro_batch_rows=3"]
        few += [f"run.folder={place}", f"model.path={folder}"]
        process = start(Path("configs/local.yaml"), "-m", "uniapl", *few, folder=ROOT)
        output, _ = process.communicate(timeout=540)
        assert process.returncode == 0, output[-4000:]
        assert_memory_freed(before)
        yield output, place / "few"
        shutil.rmtree(place)  # gigabytes of checkpoint and model

    def test_every_step_has_all_terms_of_the_objective_and_a_verified_reward(self, run: tuple[str, Path]) -> None:
        metrics = read_metrics(run[1])  # finite, or it raises
        assert [m["step"] for m in metrics] == [*range(1, STEPS + 1)]
        for m in metrics:
            assert {"loss/preference", "loss/demonstration", "loss/adversarial", "loss/total"} <= m.keys()
            assert m["learner/grad_norm"] > 0 and m["expert/nll"] > 0
            assert 0 <= m["reward/mean"] <= 1 and any(key.startswith("check/") for key in m)
            assert m["discriminator/expert_mean"] == pytest.approx(1.0), "the encoder, against itself"
            assert m["tokens/generated"] > 4 * 4

    def test_engine_and_learner_agree_in_bfloat16_before_and_after_every_broadcast(self, run: tuple[str, Path]) -> None:
        plan = make_plan(load_config(run[1] / "config.yaml"), Machines(gpus=0), Rates())
        for m in read_metrics(run[1]):
            assert m["kl/behaviour"] < KL_BOUND["bfloat16"]
            assert (m["broadcast/engines"], m["broadcast/attempts"]) == (1.0, 1.0)
            assert m["broadcast/bytes"] == pytest.approx(2 * 134_515_008, rel=1e-5), "all weights, 2 bytes each"
            assert m["broadcast/bytes"] == pytest.approx(plan.broadcast_bytes, rel=0.001), "and checksums"
        assert "] engine and learner agree: KL " in run[0]
        assert "after the last broadcast 1 engine and the learner agree: KL " in run[0]

    def test_the_times_of_a_step_add_up(self, run: tuple[str, Path]) -> None:
        """How much of it is neither generating nor training is measured, on a quiet machine: docs/benchmarks.md."""
        assert all(abs(m["time/other"]) <= 0.05 * m["time/step"] for m in read_metrics(run[1]))

    def test_the_run_leaves_evaluations_a_report_and_a_model(self, run: tuple[str, Path]) -> None:
        output, place = run
        assert output.rstrip().endswith(f"report: {place / 'report.html'}")
        assert "<svg" in (place / "report.html").read_text()
        for name in ("before", "after"):
            found = Evaluation.load(place / "eval" / f"{name}.json")
            assert (found.step, len(found.samples)) == ({"before": 0, "after": STEPS}[name], 4)
        assert (place / "model" / "model.safetensors").stat().st_size > 2 * 134_515_008
