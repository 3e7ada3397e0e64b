"""A Hugging Face data set as a source of rows, streamed: nothing of it is kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from uniapl.data.errors import DataError
from uniapl.data.importing.records import Record

PREFIX = "hf:"
_SAVED = ("dataset_info.json", "dataset_dict.json")
"""What `save_to_disk` writes into its folder."""


class HubSource:
    """`hf:NAME[:SPLIT[:CONFIG]]`; NAME is that of a hub, or a folder that `load_dataset` or `load_from_disk` reads.

    Raises:
        DataError: the package `datasets` is missing, no hub can be reached, or it has no such data set or split.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        path, split, config = _parts(name)
        try:
            import datasets
            from huggingface_hub.utils import logging
        except ImportError:
            raise DataError(f"{name}: the package datasets is missing; allowed: after `pip install datasets`") from None
        datasets.disable_progress_bars()
        logging.set_verbosity_error()  # a line for every attempt to reach the hub
        try:
            self._data, self._version = _open(path, split, config)
            self.columns = list(self._data.column_names or next(iter(self._data)))
        except StopIteration:
            raise DataError(f"{name}: no rows; allowed: at least one row") from None
        except Exception as error:  # hub, network and file readers raise nearly anything
            raise DataError(
                f"{name}: {_short(error)}; allowed: a data set of a hub that can be reached, or a folder"
            ) from None
        known = getattr(self._data, "info", None) and (self._data.info.splits or {}).get(split)
        self.size: int | None = known.num_examples if known else None

    def identity(self, told: Callable[[int], None]) -> dict[str, Any]:
        """Name and what the library knows of its version: nothing is read for it."""
        return {"name": self.name, "version": self._version}

    def rows(self, start: int, columns: list[str]) -> Iterator[Record]:
        """The rows from number `start` on."""
        wanted = [name for name in self.columns if name in columns]
        # Of JSON files the columns are not known beforehand: later rows may have others than the first.
        data = self._data.select_columns(wanted) if self._data.column_names else self._data
        row = start
        try:
            for values in data.skip(start):
                yield Record(row, f"{self.name}: row {row}", dict(values), row + 1)
                row += 1
        except Exception as error:  # as above
            raise DataError(
                f"{self.name}: row {row}: {_short(error)}; allowed: rows that can be read; the same command goes on"
            ) from None


def _parts(name: str) -> tuple[str, str, str | None]:
    parts = name.removeprefix(PREFIX).split(":")
    if not parts[0] or len(parts) > 3:
        raise DataError(
            f"{name}: cannot be read; allowed: hf:NAME[:SPLIT[:CONFIG]], such as hf:openai/gsm8k:train:main"
        )
    return parts[0], parts[1] if len(parts) > 1 else "train", parts[2] if len(parts) > 2 else None


def _open(path: str, split: str, config: str | None) -> tuple[Any, str]:
    """The split, and its version: a fingerprint, or where the hub's commit stands."""
    import datasets

    if any(os.path.isfile(Path(path) / name) for name in _SAVED):
        saved = datasets.load_from_disk(path)
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"no split '{split}' but {', '.join(saved)}")
            saved = saved[split]
        return saved, str(saved._fingerprint)
    builder = datasets.load_dataset_builder(path, config)
    return builder.as_streaming_dataset(split=split), f"{builder.base_path} {builder.hash}"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
