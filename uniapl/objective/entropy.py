"""Exact entropy of the policy's next-token distribution, without a [tokens, vocab] tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from uniapl.objective.logprobs import CHUNK_TOKENS


@torch.no_grad()
def token_entropy(hidden: Tensor, weight: Tensor, temperature: Tensor) -> Tensor:
    """-sum_v p_v log p_v with p = softmax(hidden @ weight.T / temperature), in nats, in chunks over the tokens, [N].

    Args:
        hidden: [N, hidden size].
        weight: [vocabulary, hidden size].
        temperature: [N], > 0.
    """
    scaled = (hidden / temperature[:, None]).to(hidden.dtype)
    found = [_entropy(chunk @ weight.T) for chunk in scaled.split(CHUNK_TOKENS) if len(chunk)]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


def _entropy(logits: Tensor) -> Tensor:
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)
