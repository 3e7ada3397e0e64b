"""The part of the configuration that says how the policy is trained: ranks, rows, optimizer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from uniapl.config_types import Dtype, Fraction, NonNegative, Positive, Section, Weight


class LearnerConfig(Section):
    """ZeRO-3 ranks and their optimizer."""

    ranks: Positive = Field(1, description="processes of the learner; with GPUs one GPU each")
    dtype: Dtype = Field("bfloat16", description="of weights and arithmetic; masters and optimizer stay float32")
    row_tokens: Positive = Field(2048, description="tokens of one packed row, at most; memory grows with it")
    share_prompts: bool = Field(True, description="compute the prompt of a group once for all its samples")
    micro_batch_rows: Positive = Field(1, description="packed rows of one forward pass")
    steps_per_batch: Positive = Field(1, description="optimizer steps on every batch; with several the clip binds")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-5, description="AdamW's, at its peak")
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="cosine's end / peak")
    warmup_steps: NonNegative = Field(3, description="optimizer steps of linear warm-up")
    weight_decay: Weight = Field(0.0, description="AdamW's")
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field([0.9, 0.95], description="AdamW's")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="the whole gradient is clipped to it")
    activation_checkpointing: bool = Field(False, description="compute activations twice, keep few: less memory")
    threads: NonNegative = Field(0, description="CPU threads of one rank; 0: all cores shared by the ranks")
