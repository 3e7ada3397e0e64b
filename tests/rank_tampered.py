"""One rank that loads checkpoints into which somebody put code. Started by test_security_checkpoints.py."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from helpers_zero import batch, config, full_weights, open_engine

from learner.checkpoint import load_engine, save_engine
from learner.step import train_step
from learner.universal import write_universal
from learner.zero_files import TAG
from uniapl.objective.controllers import Controllers
from uniapl.runlog import RunError


class Code:
    """What a pickle runs when it is loaded: makes the folder `place`."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._place),)


def main(spec: dict[str, Any], out: Path, rank: int) -> None:
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        c, place = config(spec["model"], dtype=dtype), out / dtype
        engine, _ = open_engine(c, 1)
        train_step(engine, batch(), c, Controllers(c.objective).weights(0), 1e-2, "cpu")
        save_engine(engine, place)
        loaded, _ = open_engine(c, 1)
        load_engine(loaded, place)
        save_engine(loaded, out / f"{dtype}-again")
        load_engine(loaded, out / f"{dtype}-again")
        found[dtype] = torch.equal(full_weights(engine), full_weights(loaded))
    for ranks in (1, 2):
        for kind in ("optim", "model"):
            found[f"{ranks} {kind}"] = _tampered(loaded, out, ranks, kind)
    torch.save(found, out / f"found-{rank}.pt")


def _tampered(engine: Any, out: Path, ranks: int, kind: str) -> tuple[str, bool]:
    """What loading says, and whether the code was run."""
    place, ran = out / f"{ranks}-{kind}", out / f"ran-{ranks}-{kind}"
    shutil.copytree(out / "bfloat16", place)
    for path in list((place / TAG).glob(f"*{kind}_states.pt")):
        torch.save(torch.load(path, weights_only=False) | {"note": Code(ran)}, path)
    for path in list((place / TAG).glob("*_optim_states.pt")) if ranks == 2 else []:  # goes by the universal checkpoint
        shutil.copy(path, path.with_name(path.name.replace("pp_rank_0", "pp_rank_1")))
    try:
        if ranks == 2:
            write_universal(place, out / f"{ranks}-{kind}-universal")
        load_engine(engine, place)
    except RunError as error:
        return str(error), ran.exists()
    return "loaded", ran.exists()
