"""A tiny random reward model, and comparisons with one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from helpers_tiny import tiny_tokenizer
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from uniapl.discriminators import Comparison

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What does the fox say?"}]


def compare(expert: str, responses: Sequence[str], content: str | None = None) -> Comparison:
    """With `MESSAGES`, or with one message of the user's."""
    return Comparison(MESSAGES if content is None else [{"role": "user", "content": content}], expert, responses)


def tiny_reward_model(folder: Path, longest: int = 256, labels: int = 1, **config: object) -> Path:
    """A random Qwen3 sequence classifier of 2 layers and hidden size 32 with the tiny tokenizer."""
    tokenizer = tiny_tokenizer(folder)
    torch.manual_seed(1)
    model = Qwen3ForSequenceClassification(
        Qwen3Config(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=longest,
            num_labels=labels,
            initializer_range=0.2,
            **{"pad_token_id": tokenizer.pad_token_id, **config},
        )
    )
    model.save_pretrained(folder)
    return folder
