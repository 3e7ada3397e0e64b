"""The policy: a Hugging Face causal language model that answers with token log-probabilities."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from uniapl.objective.logprobs import TokenLogprobHead
from uniapl.objective.rows import Row

PREFIX = "model."
"""What `Policy` puts before the parameter names of the Hugging Face model."""


class Policy(nn.Module):
    """Wraps a `...ForCausalLM`; its output layer answers for the targets alone."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        model.set_output_embeddings(TokenLogprobHead(model.get_output_embeddings()))
        self.model = model
        self.autocast = autocast

    def forward(self, row: Row) -> Tensor:
        """Log-probabilities of the row's targets, [N], float32."""
        with self._autocast(row.input_ids.device.type):
            hidden = self.model.base_model(
                input_ids=row.input_ids, position_ids=row.position_ids, attention_mask=None, use_cache=False
            ).last_hidden_state
            head = self.model.get_output_embeddings()
            return head(hidden[0, row.index], row.targets, row.temperature).float()

    def _autocast(self, device: str) -> AbstractContextManager[object]:
        return torch.autocast(device, self.autocast) if self.autocast is not None else nullcontext()


def load_policy(path: str, autocast: torch.dtype | None = None, activation_checkpointing: bool = False) -> Policy:
    """The policy in a Hugging Face folder, weights in float32, in training mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(model.train(), autocast)
