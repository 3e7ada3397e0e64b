"""Every message of an error that a user may cause says what to do next."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ERRORS = {"ConfigError", "DataError", "RunError", "SelfCheckError", "StorageError"}
PLAIN = {"RuntimeError", "TimeoutError", "BroadcastError"}
"""Errors without a line of their own for the user: each has to become one, or not to reach the user."""
NEXT = (
    "allowed",
    "required",
    "`",
    "make room",
    "tells",
    "--resume",
    "_NEXT",
    "ALLOWED",
    "_next(",
    "kept(",
    "{again}",
    "--on-bad-row",
)
"""One of these is in it: what is allowed, a command, or a name in the code for such a clause."""
HANDED_ON = [
    "cluster/evaluate_model.py: DataError",
    "uniapl/data/importing/files.py: DataError",
    "uniapl/data/importing/rows.py: DataError",
    "uniapl/data/sources.py: DataError",
    "uniapl/evals/suites.py: DataError",
    "uniapl/storage.py: StorageError",
]
"""Where the message is another error's, with the place before it: once in each of these files."""


BECOME_ONE_LINE = {
    "cluster/system.py: TimeoutError": 3,
    "learner/group.py: TimeoutError": 1,
    "learner/engine_client.py: BroadcastError": 1,
    "learner/gloo_sender.py: BroadcastError": 2,
    "learner/nccl_sender.py: BroadcastError": 1,
}
"""Raised while a system runs, or handed on to there by `LearnerGroup`: `cluster.failures.told_in_one_line` has one line
of each, with where `--resume` goes on (`test_failures.py`)."""
NOT_THE_USERS = {
    "actors/reward_service.py: RuntimeError": 1,  # a replica's word to Ray Serve, which replaces it
    "learner/gloo_sender.py: RuntimeError": 1,  # a mistake in the code, which keeps its traceback: to send when closed
    "uniapl/rewards/calls.py: TimeoutError": 2,  # not raised: why a sample has no score
}


def messages(names: set[str]) -> Iterator[tuple[str, str]]:
    """(file and error, the message's expression) of every error of these classes whose message is put together where it
    is made."""
    for folder in ("uniapl", "actors", "learner", "cluster"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names):
                    continue
                if node.args and isinstance(node.args[0], ast.JoinedStr | ast.Constant):
                    yield f"{path.relative_to(ROOT)}: {node.func.id}", ast.unparse(node.args[0])


def test_every_message_says_what_to_do_next() -> None:
    found = list(messages(ERRORS))
    assert len(found) > 150
    mute = [(where, said) for where, said in found if not any(word in said for word in NEXT)]
    assert sorted(where for where, _ in mute) == HANDED_ON, mute


def test_every_other_error_becomes_one_line_or_does_not_reach_the_user() -> None:
    assert Counter(where for where, _ in messages(PLAIN)) == BECOME_ONE_LINE | NOT_THE_USERS
