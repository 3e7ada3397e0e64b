"""config.json of the models that configs/qwen3-*.yaml train: all that `uniapl plan` reads of them."""

from __future__ import annotations

from pathlib import Path

SHAPES = {
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "qwen3-4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "qwen3-32b": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
}
PARAMETERS = {"qwen3-0.6b": 596_049_920, "qwen3-4b": 4_022_468_096, "qwen3-32b": 32_762_123_264}
"""As on the models' pages: 0.6B, 4.0B, 32.8B."""


def write_config(name: str, folder: Path) -> Path:
    """`folder` with the config.json of the model `name`."""
    from transformers import Qwen3Config

    shape = SHAPES[name] | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
    shape |= {"tie_word_embeddings": name != "qwen3-32b", "max_position_embeddings": 40_960}
    config = Qwen3Config(**shape, architectures=["Qwen3ForCausalLM"])
    config.save_pretrained(folder)
    return folder
