"""What the short and the long form of the fault table share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers_faults import World, world


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A head with room for two learner ranks and one engine."""
    with world(tmp_path_factory.mktemp("faults"), 3) as made:
        yield made
