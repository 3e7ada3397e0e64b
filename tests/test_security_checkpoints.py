"""A checkpoint is read as data: code that somebody put into its files is refused, not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_zero import run_ranks
from rank_tampered import Code

from learner.safe_load import safe_load
from uniapl.runlog import RunError


@pytest.fixture(scope="module")
def found(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = run_ranks("rank_tampered", tmp_path_factory.mktemp("tampered") / "out", 1, {"model": str(tiny)})
    return torch.load(out / "found-0.pt", weights_only=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_deepspeed_writes_is_loaded_and_written_again(found: dict[str, Any], dtype: str) -> None:
    assert found[dtype] is True


@pytest.mark.parametrize("kind", ["optim", "model"])
@pytest.mark.parametrize("ranks", [1, 2], ids=["as saved", "by other ranks"])
def test_code_in_a_checkpoint_is_refused_and_not_run(found: dict[str, Any], ranks: int, kind: str) -> None:
    said, ran = found[f"{ranks} {kind}"]
    assert f"{kind}_states.pt: holds something that DeepSpeed does not write: " in said
    assert said.endswith("; allowed: what this run wrote, with model.path as it was")
    assert not ran


def test_the_code_would_run_when_loaded_otherwise(tmp_path: Path) -> None:
    torch.save({"note": Code(tmp_path / "ran")}, tmp_path / "file.pt")
    with pytest.raises(RunError, match=r"file\.pt: holds something"):
        safe_load(tmp_path / "file.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "ran").exists()
