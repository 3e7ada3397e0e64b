"""Who sees whom in packed rows, in the form that each attention implementation takes.

`sdpa` takes a dense mask, `flex_attention` a block mask that skips what nobody sees, and `flash_attention_2` none:
it tells the sequences of one long row apart by their positions, so that no prompt can be shared.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from uniapl.objective.rows import Rows

Attention = Literal["sdpa", "flex_attention", "flash_attention_2"]


def model_inputs(rows: Rows, attention: str) -> dict[str, Any]:
    """What the transformer reads of the rows; its hidden states stand, flattened, as `rows.index` expects.

    Args:
        rows: on the model's device.
        attention: the model's implementation, one of `Attention`.

    Raises:
        ValueError: prompts are shared, and the implementation cannot do it.
    """
    ids, positions = rows.input_ids, rows.position_ids
    if attention == "flash_attention_2":
        if rows.shared:
            raise ValueError("flash_attention_2 cannot share prompts; allowed: blocks of one sequence")
        return {"input_ids": ids.view(1, -1), "position_ids": positions.view(1, -1), "attention_mask": None}
    if attention == "flex_attention":
        return {"input_ids": ids, "position_ids": positions, "attention_mask": block_mask(rows.owner, rows.segments)}
    # Without shared prompts the model makes the block-diagonal mask from the positions by itself.
    mask = dense_mask(rows.owner, rows.segments) if rows.shared else None
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}


def dense_mask(owner: Tensor, segments: Tensor) -> Tensor:
    """[B, 1, T, T], true where the query (second last) sees the key (last).

    A token sees earlier tokens of its block that are of the prompt (segment 0) or of its own response.
    Padding (owner -1) sees padding alone, and every token itself, so that no row of the mask is empty.

    Args:
        owner, segments: [B, T], see `Rows`.
    """
    same_block = owner[:, :, None] == owner[:, None, :]
    same_or_prompt = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    causal = torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool, device=owner.device).tril()
    return (same_block & same_or_prompt & causal)[:, None]


def block_mask(owner: Tensor, segments: Tensor) -> Any:
    """The same as a `BlockMask` of PyTorch's flex attention."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same_or_prompt = (segments[b, q] == segments[b, k]) | (segments[b, k] == 0)
        return (owner[b, q] == owner[b, k]) & same_or_prompt & (q >= k)

    rows, width = owner.shape
    return create_block_mask(visible, B=rows, H=None, Q_LEN=width, KV_LEN=width, device=owner.device)
