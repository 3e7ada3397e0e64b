"""Token log-probabilities from hidden states, without a [tokens, vocab] tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_LOGITS = 7 << 20
"""Logits that exist at one time: 28 MiB in float32, whatever the vocabulary."""
FEWEST_TOKENS = 16
"""Of a chunk: with fewer the matrix product is no longer one."""


def chunk_tokens(vocabulary: int) -> int:
    """How many tokens' logits are made at a time."""
    return max(FEWEST_TOKENS, CHUNK_LOGITS // vocabulary)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T / temperature)[target], in chunks over the tokens, [N].

    Args:
        hidden: [N, hidden size].
        weight: [vocabulary, hidden size].
        targets: [N], token ids.
        temperature: [N], > 0.
    """
    if targets.numel() == 0:
        return hidden.sum(dim=-1) * 0.0 + weight.sum() * 0.0
    scaled = (hidden / temperature[:, None]).to(hidden.dtype)
    # PyTorch's own choice is a few tokens per chunk, and float32 arithmetic for bfloat16 input: 20 times slower.
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=chunk_tokens(len(weight)), chunking_method=None, acc_policy="accurate"
    )
    return -F.linear_cross_entropy(scaled, weight, targets, reduction="none", options=options)
