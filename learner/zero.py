"""The DeepSpeed ZeRO-3 engine of one rank."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
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


def build_engine(policy: nn.Module, config: LearnerConfig, ranks: int, device: Device) -> deepspeed.DeepSpeedEngine:
    """Shard `policy` over the ranks, with AdamW whose state is sharded too.

    Args:
        policy: the same weights on every rank.
        config: optimizer settings.
        ranks: of the process group.
        device: of this rank.
    """
    _gather_by_layer(policy)
    optimizer = torch.optim.AdamW(
        _decay_groups(policy, config.weight_decay), lr=config.learning_rate, betas=config.betas, fused=True
    )
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=_engine_config(config, ranks, device))
    engine.optimizer.flatten = _flat(engine.optimizer.flatten)
    return engine


def build_reference(policy: nn.Module, config: LearnerConfig, ranks: int, device: Device) -> deepspeed.DeepSpeedEngine:
    """Shard a frozen `policy` over the ranks, without gradients and without an optimizer.

    Args:
        policy: the same weights on every rank.
        config: whose `dtype` says what it computes in.
        ranks: of the process group.
        device: of this rank.
    """
    policy.eval().requires_grad_(False)
    _gather_by_layer(policy)
    engine, *_ = deepspeed.initialize(model=policy, config=_sharded(config, ranks, device))
    return engine


def _gather_by_layer(policy: nn.Module) -> None:
    """A layer's weights are gathered and its gradients reduced together: hooks for every module in it cost more."""
    layers = {name for module in policy.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    set_z3_leaf_modules(policy, sorted(layers), raise_if_not_found=False)


def _flat(flatten: Callable[[list[Tensor]], Tensor]) -> Callable[[list[Tensor]], Tensor]:
    """What DeepSpeed joins its gradients with before the optimizer's step, but for those that lie end to end already.

    They all do, in the one buffer of their sums. A copy of it, 4 bytes for each parameter of this rank, would be
    changed in place and forgotten; so is the buffer itself, for the next backward pass writes it anew.
    """

    def joined(parts: list[Tensor]) -> Tensor:
        start = end = parts[0].storage_offset()
        memory = parts[0].untyped_storage().data_ptr()
        for part in parts:
            if part.untyped_storage().data_ptr() != memory or part.storage_offset() != end or part.dim() != 1:
                return flatten(parts)
            end += part.numel()
        return parts[0].as_strided((end - start,), (1,))

    return joined


def _decay_groups(policy: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms) do not."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": parameters, "weight_decay": 0.0}]
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def _engine_config(config: LearnerConfig, ranks: int, device: Device) -> dict[str, Any]:
    return _sharded(config, ranks, device) | {
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm,
        "zero_allow_untested_optimizer": True,
    }


def _sharded(config: LearnerConfig, ranks: int, device: Device) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3, "overlap_comm": False, "reduce_bucket_size": device.reduce_bucket}
    # A single rank has nobody to share with: releasing and gathering its own weights would only copy them, and so
    # would cutting gradients into parts. PyTorch's own linear layer may hold on to weights that were gathered.
    alone = ranks == 1
    zero["stage3_param_persistence_threshold"] = PERSIST_WHOLE_MODEL if alone else 10_000
    zero |= {"reduce_scatter": not alone, "memory_efficient_linear": not alone}
    low: dict[str, Any] = {}
    if config.dtype == "bfloat16":
        # Weights and arithmetic in bfloat16; master weights, gradient sums and optimizer stay float32.
        low = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return low | {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": 10**9}
