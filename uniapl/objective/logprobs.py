"""Token log-probabilities from hidden states, without a [tokens, vocab] tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        scaled, weight = scaled.to(dtype), weight.to(dtype)
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(scaled, weight, targets, reduction="none", options=options)
