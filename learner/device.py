"""All that differs between CPU and GPU learners, in one place. Imports torch only where a learner calls it."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uniapl.attention import Attention

DEEPSPEEDS_BUCKET = 500_000_000
"""Its default."""
HEAPS_BUCKET = 4_000_000
"""Whose float32 copy glibc's heap keeps from one micro-batch to the next, see `cpu_environment`."""


@dataclass(frozen=True)
class Device:
    """Where one rank computes and how ranks talk."""

    torch_device: str
    backend: str
    """Of the process group among the ranks, and of the weight broadcast to other GPUs."""
    attention: Attention
    """Of the policy; see `uniapl.attention`."""
    reduce_bucket: int
    """Elements of gradients that are reduced together."""

    @property
    def shares_prompts(self) -> bool:
        return self.attention != "flash_attention_2"


def local_device(local_rank: int, dtype: str = "bfloat16") -> Device:
    """CUDA where there is any, else the CPU; `dtype`: of the policy's arithmetic."""
    import torch

    if torch.cuda.is_available():
        return Device(f"cuda:{local_rank}", "nccl", _cuda_attention(dtype), DEEPSPEEDS_BUCKET)
    return Device("cpu", "gloo", "sdpa", HEAPS_BUCKET)


def _cuda_attention(dtype: str) -> Attention:
    """Flex attention needs Triton to be compiled; FlashAttention is a package of its own, and knows no float32."""
    if importlib.util.find_spec("triton"):
        return "flex_attention"
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") and dtype != "float32" else "sdpa"


def give_back_memory() -> None:
    """Leave the GPU's memory that holds nothing at present to other processes; on a CPU the heap keeps it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def cpu_environment() -> dict[str, str]:
    """Variables that must stand in a CPU learner's environment before its process starts.

    glibc gives every large block back to the system and faults it in again at the next allocation; told
    to keep those below 32 MiB (activations, not weights or optimizer state, which would leave holes), a training
    step is faster (docs/benchmarks.md says by how much).
    """
    heap = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": "-1"}
    # DeepSpeed asks how many devices there are at every reduction; unless told, it starts `numactl` to find out.
    told = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "1"}
    # Nothing is compiled on a CPU, but DeepSpeed's optimizers prepare for it at import: 3 to 6 s.
    return heap | told | {"TORCHDYNAMO_DISABLE": "1"}


def set_threads(threads: int, ranks: int) -> None:
    """Use `threads` CPU threads in this process; 0: this machine's cores shared by the ranks."""
    import torch

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // ranks))
