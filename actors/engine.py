"""All that differs between CPU and GPU rollout engines, in one place."""

from __future__ import annotations

import os
from typing import Any

from uniapl.config import Config

CPU_BATCHED_TOKENS = 8192
"""Tokens of one engine step on a CPU, prompts included."""


def environment(config: Config, gpu: bool) -> dict[str, str]:
    """Variables that must stand in a rollout actor's environment before its process starts."""
    level = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
    common = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": level, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    if gpu:
        return common
    threads = config.rollout.threads or len(os.sched_getaffinity(0))
    return common | {
        # `auto` binds every engine to the same first cores, whatever else runs there.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "TORCHDYNAMO_DISABLE": "1",  # the engine runs eagerly: nothing is compiled, and nothing prepared for it
    }


def engine_args(config: Config, gpu: bool) -> Any:
    """vLLM's arguments for one engine of this run."""
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig

    from actors import weight_receiver

    options = _options(config, gpu)
    if _one_cpu_worker(config, gpu):
        from actors.executor import InProcessExecutor

        options["distributed_executor_backend"] = InProcessExecutor
    # nccl does not connect two processes of one GPU.
    backend = weight_receiver.NCCL_BACKEND if gpu and not config.rollout.colocate else weight_receiver.BACKEND
    return AsyncEngineArgs(
        weight_transfer_config=WeightTransferConfig(backend=backend),
        worker_extension_cls=f"{weight_receiver.__name__}.{weight_receiver.WorkerExtension.__name__}",
        **options,
    )


def offline_engine_args(config: Config, gpu: bool) -> Any:
    """The same for an engine in the caller's own process, which gets its weights from the model's folder alone."""
    from vllm import EngineArgs

    options = _options(config, gpu)
    if _one_cpu_worker(config, gpu):
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        options["distributed_executor_backend"] = UniProcExecutor
    return EngineArgs(use_tqdm_on_load=False, **options)


def _one_cpu_worker(config: Config, gpu: bool) -> bool:
    """Whether the executor is chosen here.

    vLLM would put the only worker of a CPU engine into a process of its own, to give it OpenMP settings;
    here they stand in the environment already, and one process less starts faster and leaves no shared
    memory behind when it is killed.
    """
    return not gpu and config.rollout.tensor_parallel == 1


def _options(config: Config, gpu: bool) -> dict[str, Any]:
    r = config.rollout
    side = _gpu_args(config) if gpu else _cpu_args(config)
    return {
        "model": config.model.path,
        "dtype": r.dtype,
        "seed": config.run.seed,
        "max_model_len": r.max_model_len,
        "max_num_seqs": r.max_num_seqs,
        "tensor_parallel_size": r.tensor_parallel,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        **side,
    }


def _gpu_args(config: Config) -> dict[str, Any]:
    r = config.rollout
    return {
        "enforce_eager": r.enforce_eager,
        "gpu_memory_utilization": r.gpu_memory_utilization,
        "enable_sleep_mode": r.colocate,
    }


def _cpu_args(config: Config) -> dict[str, Any]:
    """Eager: compiling takes longer than a small model generates. KV blocks of 32 are faster than 16."""
    cache = int(config.rollout.kv_cache_gib * (1 << 30))
    side: dict[str, Any] = {"enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": cache}
    # vLLM 0.32 ends the engine when a request with a seed has its prompt prefilled in pieces on a CPU
    # ("CPU Generator does not use offset"): prefill whole prompts.
    side |= {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, config.rollout.max_model_len),
    }
    return side
