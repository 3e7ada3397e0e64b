"""The policy as a Hugging Face folder: from the ranks at the end of a run, or from a checkpoint's shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.shards import SavedWeights
from learner.zero_files import ALLOWED, ranks_in
from uniapl.policy import PREFIX
from uniapl.runlog import RunError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_folder(model: Any, state: dict[str, Tensor], source: str, folder: Path, card: str) -> None:
    """Weights as safetensors, configuration, generation configuration, tokenizer with chat template, model card.

    Args:
        model: of transformers; of its weights only the dtype is looked at, for the configuration.
        state: all its parameters by their names there, of that dtype.
        source: the folder that training began from, whose tokenizer goes along.
        folder: replaced if it is there, once the new one is whole.
        card: text of README.md.
    """
    from transformers import AutoTokenizer

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, state_dict=state)
        AutoTokenizer.from_pretrained(source).save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk has room again
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def export_shards(
    shards: Path, source: str, folder: Path, dtype: str, card: str, told: Callable[[int, int], None]
) -> None:
    """Write the policy that ZeRO-3 ranks saved, however many they were; no process group, no GPU, no Ray.

    The weights are the float32 masters in `dtype`: with the learner's own dtype those that it computed with.

    Args:
        shards: folder of the checkpoint's ZeRO-3 state.
        source: the folder that training began from.
        folder: to be written.
        dtype: `float32` or `bfloat16`.
        card: text of README.md.
        told: called with parameters read and their number.

    Raises:
        RunError: there is no state, it is of another model, or holds something that DeepSpeed does not write.
    """
    if (ranks := ranks_in(shards)) == 0:
        raise RunError(f"{shards}: holds no ZeRO-3 state; {ALLOWED}")
    saved = SavedWeights(shards, ranks)
    model = _without_weights(source).to(DTYPES[dtype])
    names = [name for name, _ in model.named_parameters()]
    if {PREFIX + name for name in names} != saved.places.keys():
        raise RunError(f"{shards}: holds other parameters than {source} has; {ALLOWED}")
    state = {}
    for number, name in enumerate(names, start=1):
        state[name] = saved.whole(PREFIX + name).to(DTYPES[dtype])
        told(number, len(names))
    write_folder(model, state, source, folder, card)


def _without_weights(source: str) -> Any:
    """The model of a folder, its parameters on the meta device: shapes and names alone."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    if (Path(source) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model
