"""Checks that need PyTorch: GPUs with their libraries, and gloo."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from cluster.doctor import Check, Finding

DRIVER = Path("/proc/driver/nvidia/version")
GLOO_S = 10.0


def checks() -> dict[str, Check]:
    """By name, in the order of the table."""
    return {"GPU": gpu, "NCCL": nccl, "gloo": gloo}


def gpu(driver: Path = DRIVER) -> Finding:
    """Devices, driver and the CUDA that PyTorch was built for."""
    import torch

    built = f"PyTorch {torch.__version__}"
    if not driver.is_file():
        return Finding("GPU", "ok", f"none; everything runs on the CPU ({built})")
    number = driver.read_text().partition("Kernel Module")[2].split()
    version = f"driver {number[0] if number else 'unknown'}"
    if torch.version.cuda is None:
        advice = "PyTorch is built for CPUs: install requirements/gpu.txt"
        return Finding("GPU", "problem", f"{version}, and {built}", advice)
    if not torch.cuda.is_available():
        advice = f"CUDA {torch.version.cuda} needs a newer driver, or the container wants --gpus all"
        return Finding("GPU", "problem", f"{version}, but PyTorch sees no device ({built})", advice)
    free = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
    sizes = [f"{a / 2**30:.0f} of {b / 2**30:.0f} GiB free" for a, b in free]
    names = ", ".join(f"{torch.cuda.get_device_name(i)} {size}" for i, size in enumerate(sizes))
    if any(a < 0.9 * b for a, b in free):
        return Finding("GPU", "warning", f"{names}; {version}", "another program holds memory: `nvidia-smi` names it")
    return Finding("GPU", "ok", f"{names}; {version}, CUDA {torch.version.cuda}")


def nccl() -> Finding:
    """Its version, where there is a GPU to use it."""
    import torch

    if not torch.cuda.is_available():
        return Finding("NCCL", "ok", "not used: no GPU")
    if not torch.distributed.is_nccl_available():
        return Finding("NCCL", "problem", "PyTorch was built without it", "install requirements/gpu.txt")
    return Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def gloo() -> Finding:
    """One rank's sum, over the interface that a run will take."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return Finding("gloo", "ok", "in use by this process")
    try:
        limit = timedelta(seconds=GLOO_S)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        return Finding("gloo", "problem", reason, "name an interface that is up: GLOO_SOCKET_IFNAME=lo on one machine")
    return Finding("gloo", "ok", "a process group forms")
