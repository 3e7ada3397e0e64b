"""The DeepSpeed ZeRO-3 engine of one rank."""

from __future__ import annotations

import importlib
import os
import warnings
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore

from learner.device import Device
from uniapl.config import LearnerConfig
from uniapl.transfer import open_store

PERSIST_WHOLE_MODEL = 10**12


def join_ranks(device: Device, timeout_s: float) -> None:
    """Join the process group named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Raises:
        RuntimeError: the other ranks did not come within `timeout_s`.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    _no_shared_memory_kernels()
    if device.backend == "nccl":
        torch.cuda.set_device(device.torch_device)
    rank, ranks, host, port = (os.environ[key] for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    timeout = timedelta(seconds=timeout_s)
    # Not by MASTER_ADDR alone: the store that PyTorch then opens listens on all addresses of the machine.
    store = open_store(host, timeout_s, int(port)) if rank == "0" else TCPStore(host, int(port), timeout=timeout)
    # A device for nccl alone, and only where there is somebody to talk to, as DeepSpeed itself does it.
    bound = torch.device(device.torch_device) if device.backend == "nccl" and int(ranks) > 1 else None
    dist.init_process_group(
        device.backend, store=store, rank=int(rank), world_size=int(ranks), timeout=timeout, device_id=bound
    )
    deepspeed.init_distributed(dist_backend=device.backend, timeout=timeout, verbose=False)


def _no_shared_memory_kernels() -> None:
    """Keep DeepSpeed's CPU all-reduce kernels out: gloo does the same work.

    They are compiled on first use (a minute, and a C++ compiler that a fresh machine may lack), and
    leave 66 MiB a rank in /dev/shm when a process is killed. DeepSpeed 0.19 has no setting for it.
    """
    # `deepspeed.comm.torch` as an attribute is the package torch, as a module it is DeepSpeed's backend.
    backend = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]


def build_engine(policy: nn.Module, config: LearnerConfig, ranks: int) -> deepspeed.DeepSpeedEngine:
    """Shard `policy` over the ranks, with AdamW whose state is sharded too.

    Args:
        policy: the same weights on every rank.
        config: optimizer settings.
        ranks: of the process group.
    """
    optimizer = torch.optim.AdamW(
        _decay_groups(policy, config.weight_decay), lr=config.learning_rate, betas=config.betas, fused=True
    )
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=_engine_config(config, ranks))
    return engine


def build_reference(policy: nn.Module, config: LearnerConfig, ranks: int) -> deepspeed.DeepSpeedEngine:
    """Shard a frozen `policy` over the ranks, without gradients and without an optimizer.

    Args:
        policy: the same weights on every rank.
        config: whose `dtype` says what it computes in.
        ranks: of the process group.
    """
    policy.eval().requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=policy, config=_sharded(config, ranks))
    return engine


def _decay_groups(policy: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms) do not."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": parameters, "weight_decay": 0.0}]
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def _engine_config(config: LearnerConfig, ranks: int) -> dict[str, Any]:
    return _sharded(config, ranks) | {
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm,
        "zero_allow_untested_optimizer": True,
    }


def _sharded(config: LearnerConfig, ranks: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3, "overlap_comm": False}
    # A single rank has nobody to share with: releasing and gathering its own weights would only copy them.
    zero["stage3_param_persistence_threshold"] = PERSIST_WHOLE_MODEL if ranks == 1 else 10_000
    low: dict[str, Any] = {}
    if config.dtype == "bfloat16":
        # Weights and arithmetic in bfloat16; master weights, gradient sums and optimizer stay float32.
        low = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return low | {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": 10**9}
