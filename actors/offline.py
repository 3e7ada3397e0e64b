"""Sampling with vLLM in the caller's own process: no Ray, no weights that change."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xxhash

from actors.engine import environment, offline_engine_args
from uniapl.config import Config


@dataclass(frozen=True)
class Response:
    """What the model answered; `logprobs`: [tokens], those of the distribution that was sampled from."""

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float]


def sample_prompts(
    config: Config,
    gpu: bool,
    prompts: list[list[int]],
    samples: int,
    temperature: float,
    done: Callable[[Response], None] = lambda response: None,
) -> list[list[Response]]:
    """Responses to prompts, all handed to one engine at once, which batches them.

    Args:
        config: model, seed and `rollout` section, as for a rollout actor.
        gpu: whether to compute on a GPU.
        prompts: token ids.
        samples: of each prompt.
        temperature: 0: greedy.
        done: called with each response when it is finished.

    Returns:
        [prompts][samples]; what is sampled depends on the seed, the prompt's place and the sample's alone.
    """
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR"}  # the terminal belongs to the progress bar
    os.environ.update(environment(config, gpu) | quiet | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    import torch
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if config.rollout.threads and not gpu:
        torch.set_num_threads(config.rollout.threads)
    r = config.rollout
    engine = LLMEngine.from_engine_args(offline_engine_args(config, gpu))
    for place, ids in enumerate(prompts):
        for number in range(samples):
            params = SamplingParams(
                temperature=temperature,
                top_p=r.top_p,
                max_tokens=r.max_tokens,
                seed=xxhash.xxh32_intdigest(f"{config.run.seed}/{place}/{number}".encode()) >> 1,
                logprobs=0,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(f"{place}-{number}", {"prompt_token_ids": ids}, params)
    found: dict[str, Response] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                found[output.request_id] = _response(output.outputs[0])
                done(found[output.request_id])
    return [[found[f"{place}-{number}"] for number in range(samples)] for place in range(len(prompts))]


def _response(completion: Any) -> Response:
    ids = list(completion.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(ids, completion.logprobs, strict=True)]
    return Response(completion.text, ids, completion.finish_reason, logprobs)
