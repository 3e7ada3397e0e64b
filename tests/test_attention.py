"""Every attention implementation sees the same: what one token of a packed row sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_policy import group_and_more, sequences

from uniapl.attention import block_mask, dense_mask, model_inputs
from uniapl.objective.rows import Rows, make_rows, share_prompts
from uniapl.policy import load_policy


def two_rows(share: bool) -> Rows:
    blocks = share_prompts(group_and_more(), 64, share)
    return make_rows([blocks[:2], blocks[2:]])


def test_a_token_sees_its_prompt_and_its_own_response() -> None:
    a, b = group_and_more()[:2]  # prompt of 6, responses of 3 and 1
    mask = dense_mask(*(lambda rows: (rows.owner, rows.segments))(make_rows([[[a, b]]])))[0, 0]
    assert mask[8].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert mask[9].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 9]


@pytest.mark.parametrize("share", [True, False])
def test_the_block_mask_says_the_same_as_the_dense_one(share: bool) -> None:
    rows = two_rows(share)
    dense = dense_mask(rows.owner, rows.segments)
    visible = block_mask(rows.owner, rows.segments).mask_mod
    width = rows.owner.shape[1]
    b, q, k = torch.meshgrid(torch.arange(2), torch.arange(width), torch.arange(width), indexing="ij")
    assert torch.equal(visible(b, torch.zeros_like(b), q, k), dense[:, 0])


@pytest.mark.parametrize("share", [True, False])
def test_flex_attention_gives_the_same_logprobs(tiny: Path, share: bool) -> None:
    """Forward only: PyTorch has no backward of flex attention on CPUs. Uncompiled: that would take a C++ compiler."""
    rows, found = two_rows(share), []
    for attention in ("sdpa", "flex_attention"):
        policy = load_policy(str(tiny), attention=attention).requires_grad_(False)
        with torch.compiler.set_stance("force_eager"):
            found.append(policy(rows))
    assert (found[0] - found[1]).abs().max() <= 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a backward of flex attention needs a GPU")
def test_flex_attention_gives_the_same_gradients_on_a_gpu(tiny: Path) -> None:
    rows, found = two_rows(share=True).to("cuda"), []
    for attention in ("sdpa", "flex_attention"):
        policy = load_policy(str(tiny), attention=attention).cuda()
        policy(rows).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


def test_flash_attention_gets_one_long_row_and_no_shared_prompt() -> None:
    rows = make_rows([[[s] for s in sequences()[:2]], [[s] for s in sequences()[2:]]])
    inputs = model_inputs(rows, "flash_attention_2")
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == (1, rows.input_ids.numel())
    assert inputs["attention_mask"] is None
    with pytest.raises(ValueError, match="cannot share prompts"):
        model_inputs(two_rows(share=True), "flash_attention_2")
