"""The command line as a user runs it, in this process, for input that must end it with one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.cli import main


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What `uniapl ARGUMENTS` says on its error stream, which must be one line, with status 2."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert status == 2, output
    assert output.err.endswith("\n") and output.err.count("\n") == 1, output.err
    assert output.out == ""
    return output.err.removesuffix("\n")
