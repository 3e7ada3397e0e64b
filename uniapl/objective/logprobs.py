"""Token log-probabilities from hidden states, without a [tokens, vocab] tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_TOKENS = 256
"""Tokens whose logits exist at one time: 50 MB in float32 for a vocabulary of 50,000."""


class TokenLogprobHead(nn.Module):
    """Takes the place of a language model's output layer, over the same weight and under the same name.

    Being a module of its own, it has its weight gathered by ZeRO-3 when it is called.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        if head.bias is not None:
            raise ValueError("the output layer has a bias; allowed: one without")
        self.weight = head.weight

    def forward(self, hidden: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
        return token_logprobs(hidden, self.weight, targets, temperature)


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
        batch_chunk_size=CHUNK_TOKENS, chunking_method=None, acc_policy="accurate"
    )
    return -F.linear_cross_entropy(scaled, weight, targets, reduction="none", options=options)
