"""The policy: a Hugging Face causal language model that answers with token log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uniapl.attention import Attention, model_inputs
from uniapl.objective.entropy import token_entropy
from uniapl.objective.logprobs import token_logprobs
from uniapl.objective.rows import Rows

PREFIX = "model."
"""What `Policy` puts before the parameter names of the Hugging Face model."""


class TokenLogprobHead(nn.Module):
    """Takes the place of a language model's output layer, over the same weight and under the same name.

    Being a module of its own, it has its weight gathered by ZeRO-3 when it is called.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        if head.bias is not None:
            raise ValueError("the output layer has a bias; allowed: one without")
        self.weight = head.weight

    def forward(
        self, hidden: Tensor, targets: Tensor, temperature: Tensor, entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        logprobs = token_logprobs(hidden, self.weight, targets, temperature).float()
        return (logprobs, token_entropy(hidden, self.weight, temperature).float()) if entropy else logprobs


class Policy(nn.Module):
    """Wraps a `...ForCausalLM`; its output layer answers for the targets alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model.set_output_embeddings(TokenLogprobHead(model.get_output_embeddings()))
        self.model = model

    def forward(self, rows: Rows, entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities of the rows' targets at their temperatures, [N], float32.

        Args:
            entropy: return also the exact entropy of the distribution that each target is drawn from, [N],
                float32, without gradient.
        """
        inputs = model_inputs(rows, self.model.config._attn_implementation)
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        return head(hidden.flatten(0, 1)[rows.index], rows.targets, rows.temperature, entropy)


def load_policy(path: str, activation_checkpointing: bool = False, attention: Attention = "sdpa") -> Policy:
    """The policy in a Hugging Face folder, weights in float32, in training mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(model.train())
