"""ZeRO-3 state goes from 2 ranks to 1, to 3 and back to 2, bit for bit, by DeepSpeed's universal checkpoint:
policy and cotrained discriminator."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_zero import run_ranks

from learner.universal import _require_space, write_universal
from learner.zero_files import TAG, needed, saved_ranks
from uniapl.runlog import RunError

WORLDS = (2, 1, 3, 2)
"""A third of most parameters is no whole number: the last rank's shard ends in padding."""
LATER = {"argvalues": [1, 2, 3], "ids": ["2 to 1", "1 to 3", "3 to 2"]}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two steps each by 2 ranks, by 1 that loaded what those saved, by 3 that loaded what that one saved, by 2.

    What they load holds only the files that they need, as where these were fetched from an object store.
    """
    base, load, found = tmp_path_factory.mktemp("universal"), "", []
    for number, ranks in enumerate(WORLDS):
        spec = {"model": str(tiny), "load": load, "first": 2 * number}
        out = run_ranks("rank_universal", base / f"{number}", ranks, spec)
        load = str(base / f"{number}-needed")
        names = [str(path.relative_to(out)) for path in out.rglob("*")]
        for name in needed(names, [0], ranks, WORLDS[(number + 1) % len(WORLDS)]):
            (Path(load) / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).rename(Path(load) / name)
        found.append(torch.load(out / "found-0.pt"))
    return found


@pytest.mark.parametrize("later", **LATER)
def test_masters_moments_counters_and_decay_are_those_that_were_saved(runs: list[dict[str, Any]], later: int) -> None:
    saved, loaded = runs[later - 1]["saved"], runs[later]["loaded"]
    assert saved.keys() == loaded.keys()
    assert [key for key in saved if not torch.equal(saved[key], loaded[key])] == []
    assert {float(value) for key, value in loaded.items() if key.endswith("/decay")} == {0.1, 0.0}
    assert {float(value) for key, value in loaded.items() if key.endswith("/step")} == {2.0 * later}
    assert any(value.abs().max() > 0 for key, value in loaded.items() if key.endswith("/exp_avg_sq"))


@pytest.mark.parametrize("later", **LATER)
def test_the_weights_are_the_masters(runs: list[dict[str, Any]], later: int) -> None:
    weights, loaded = runs[later]["weights"], runs[later]["loaded"]
    assert [key for key, value in weights.items() if not torch.equal(value, loaded[key])] == []


def test_training_goes_on_and_a_counter_is_each_parameters_own(runs: list[dict[str, Any]]) -> None:
    for number, run in enumerate(runs):
        assert all(math.isfinite(value) for losses in run["losses"] for value in losses)
        steps = {float(value) for key, value in run["saved"].items() if key.endswith("/step")}
        assert steps == {2.0 * (number + 1)}
    losses = [policy for run in runs for policy, _ in run["losses"]]
    assert losses == sorted(losses, reverse=True), "on the same batch the loss falls in every step"


def test_what_does_not_fit_on_the_disk_is_one_line(tmp_path: Path) -> None:
    sizes = r"what another number of learner ranks loads needs \d+ MiB there, \d+ MiB are free"
    with pytest.raises(RunError, match=rf"{sizes}; allowed: learner\.ranks as it was saved, or more room$"):
        _require_space(tmp_path, 1 << 60)


def test_a_conversion_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "saved" / TAG).mkdir(parents=True)
    torch.save({}, tmp_path / "saved" / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(KeyError, match="optimizer_state_dict"):
        write_universal(tmp_path / "saved", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    assert saved_ranks(["queue.json"], tmp_path) == 0
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (2, 0)]
    with pytest.raises(RunError, match=r"holds the state of ranks \[0, 2\]; allowed: all from 0"):
        saved_ranks(names, tmp_path)
