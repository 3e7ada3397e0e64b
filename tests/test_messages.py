"""Every message of an error that a user may cause says what to do next."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ERRORS = {"ConfigError", "DataError", "RunError", "SelfCheckError", "StorageError"}
NEXT = (
    "allowed",
    "required",
    "`",
    "make room",
    "tells",
    "--resume",
    "_NEXT",
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


def messages() -> Iterator[tuple[str, str]]:
    """(file and error, the message's expression) of every error whose message is put together where it is made."""
    for folder in ("uniapl", "actors", "learner", "cluster"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS):
                    continue
                if node.args and isinstance(node.args[0], ast.JoinedStr | ast.Constant):
                    yield f"{path.relative_to(ROOT)}: {node.func.id}", ast.unparse(node.args[0])


def test_every_message_says_what_to_do_next() -> None:
    found = list(messages())
    assert len(found) > 150
    mute = [(where, said) for where, said in found if not any(word in said for word in NEXT)]
    assert sorted(where for where, _ in mute) == HANDED_ON, mute
