"""Offline sampling with vLLM: records the model's answers from which the local data set is built."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uniapl.data.plain_responses import MAX_TOKENS, SAMPLES, SYSTEM, TEMPERATURE, TOP_P, PlainSample

CHUNK = 200  # instructions in one call, so that a progress bar appears for each
CPU_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def sample_responses(model_folder: Path, instructions: list[str], seed: int) -> Iterator[list[PlainSample]]:
    """`SAMPLES` sampled answers for each instruction, by vLLM in this process.

    The same seed gives the same answers on the same machine only: they depend on its arithmetic.
    """
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm

    engine = vllm.LLM(
        model=str(model_folder),
        dtype="bfloat16",
        seed=seed,
        max_model_len=512,
        max_num_seqs=64,
        enforce_eager=True,
        block_size=32,
        disable_log_stats=True,
        logprobs_mode="raw_logprobs",
    )
    sampling = vllm.SamplingParams(n=SAMPLES, temperature=TEMPERATURE, top_p=TOP_P, max_tokens=MAX_TOKENS, logprobs=0)
    for start in range(0, len(instructions), CHUNK):
        chats: list[Any] = [_chat(text) for text in instructions[start : start + CHUNK]]
        for output in engine.chat(chats, sampling):
            yield [_plain_sample(completion) for completion in output.outputs]


def _chat(instruction: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": instruction}]


def _plain_sample(completion: Any) -> PlainSample:
    tokens = max(len(completion.token_ids), 1)
    return PlainSample(completion.text, completion.cumulative_logprob / tokens, completion.finish_reason == "stop")
