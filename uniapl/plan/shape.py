"""A model's size, from its config.json alone: no weights are read, none are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uniapl.config_errors import ConfigError
from uniapl.data.model_folder import read_model_config

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelShape:
    """A dense transformer with gated feed-forward layers."""

    parameters: int
    """Exact; a tied output layer counts once."""
    largest: int
    """Numbers in the largest parameter: the embedding, or the output layer."""
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    """Whether queries and keys are normalised per head, as in Qwen3."""

    def kv_bytes(self, dtype: str, tensor_parallel: int = 1) -> int:
        """Keys and values of one token on one device: 2 x layers x KV heads / TP (at least 1) x head_dim x bytes."""
        heads = max(1, self.kv_heads // tensor_parallel)
        return 2 * self.layers * heads * self.head_dim * DTYPE_BYTES[dtype]


def read_shape(key: str, folder: str, output_layer: bool = True) -> ModelShape:
    """The shape of the model in a Hugging Face folder, of which only config.json is read.

    Args:
        key: of the configuration, for the message.
        folder: on this machine.
        output_layer: of a language model; else the transformer without one.

    Raises:
        ConfigError: no config.json, or not that of a dense causal language model.
    """
    read_model_config(key, folder)
    config, names = _on_meta(key, folder, output_layer)
    text = config.get_text_config()
    if any(getattr(text, name, None) for name in _EXPERTS):
        raise ConfigError(f"{key}: got '{folder}', a mixture of experts; allowed: a dense model")
    try:
        return ModelShape(
            parameters=sum(names.values()),
            largest=max(names.values()),
            vocabulary=text.vocab_size,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            qk_norm=any(name.endswith("q_norm.weight") for name in names),
        )
    except AttributeError as error:
        raise ConfigError(f"{key}: got '{folder}'; {error}; allowed: a dense transformer") from None


def _on_meta(key: str, folder: str, output_layer: bool) -> tuple[Any, dict[str, int]]:
    """The model's configuration, and how many numbers each parameter holds, by name."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    kind = AutoModelForCausalLM if output_layer else AutoModel
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{key}: got '{folder}'; {reason}; allowed: a model that transformers knows") from None
    return config, {name: parameter.numel() for name, parameter in model.named_parameters()}
