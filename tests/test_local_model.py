"""SmolLM2 as a Hugging Face folder: converted once, with the tokenizer mended."""

import ast
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from uniapl.data.encoding import ChatEncoder
from uniapl.data.errors import DataError
from uniapl.data.local_model import is_whole, prepare_model

ROOT = Path(__file__).parent.parent


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


def test_batches_of_the_local_data_fill_their_rows(folder: Path) -> None:
    """At least 90 % of the row tokens are real, over 20 batches as configs/local.yaml makes them."""
    from uniapl.config import load_config
    from uniapl.data.sources import open_sources
    from uniapl.objective.rows import block_tokens, make_rows, share_prompts
    from uniapl.objective.sequences import TrainingSequence
    from uniapl.packing import pack_balanced

    config = load_config(
        ROOT / "configs/local.yaml", [f"model.path={folder}", f"data.train=[{ROOT}/data/local/train-*]"]
    )
    prompts, demonstrations = open_sources(config)
    draw, real, padded = random.Random(0), 0, 0
    for _ in range(20):
        sequences = []
        for prompt in (prompts.next() for _ in range(config.queue.groups_per_step)):
            lengths = [draw.randint(8, config.rollout.max_tokens) for _ in range(config.rollout.group_size)]
            sequences += [TrainingSequence(prompt.id, prompt.token_ids, [5] * n, 1.0, [-1.0] * n) for n in lengths]
        for shown in (demonstrations.next() for _ in range(config.queue.demonstrations_per_step)):
            sequences.append(TrainingSequence(shown.id, shown.prompt_ids, shown.response_ids, 1.0))
        blocks = share_prompts(sequences, config.learner.row_tokens, config.learner.share_prompts)
        plan = pack_balanced([block_tokens(block) for block in blocks], config.learner.row_tokens)
        real += sum(map(block_tokens, blocks))
        padded += make_rows([[blocks[i] for i in row] for row in plan]).input_ids.numel()
    assert real / padded >= 0.9
