"""The names of the files that DeepSpeed writes for ZeRO-3, one of each kind per rank, and who needs which."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from uniapl.runlog import RunError

TAG = "zero"
"""The folder of the policy's state in a checkpoint."""
UNIVERSAL = ".universal"
"""The ending of the folder beside a checkpoint that holds, while a run loads it, what another number of ranks needs."""
OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
MODEL_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"
ALLOWED = "allowed: what this run wrote, with model.path as it was"
"""For the messages of what cannot be loaded."""
_RANKS_OWN = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")


def saved_ranks(names: Iterable[str], where: str | Path) -> int:
    """How many ranks wrote the files of these names; 0: none.

    Raises:
        RunError: the files of a rank between them are missing; `where` is for the message.
    """
    found = sorted({int(m[2]) for name in names if (m := OPTIMIZER_FILE.fullmatch(name))})
    if found != list(range(len(found))):
        raise RunError(f"{where}: holds the state of ranks {found}; allowed: all from 0")
    return len(found)


def ranks_in(folder: Path) -> int:
    """How many ranks wrote the state in `folder`; 0: none.

    Raises:
        RunError: as `saved_ranks`.
    """
    return saved_ranks((path.name for path in folder.glob("*")), folder)


def is_of_a_rank(name: str) -> bool:
    """Whether a file of this name holds a rank's model or optimizer state."""
    return _RANKS_OWN.fullmatch(name) is not None


def needed(names: Iterable[str], ranks: Iterable[int], saved_by: int, world: int) -> list[str]:
    """The files of a checkpoint that some ranks read.

    Args:
        names: of all its files, such as zero/zero_pp_rank_0_mp_rank_00_model_states.pt.
        ranks: those that read.
        saved_by: the number of ranks that wrote it.
        world: the number of ranks now; with another one each reads the state of all.
    """
    own = set(ranks)
    of = {name: int(m[2]) for name in names if (m := _RANKS_OWN.fullmatch(PurePosixPath(name).name))}
    return [name for name, rank in of.items() if saved_by != world or rank in own]
