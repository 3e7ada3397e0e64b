"""An import: sources to shards, one row at a time, going on where an interrupted one stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from uniapl.data.errors import DataError
from uniapl.data.importing.files import ENDINGS, FileSource
from uniapl.data.importing.formats import Format, format_of
from uniapl.data.importing.hub import PREFIX, HubSource
from uniapl.data.importing.ledger import Counts, Ledger, alone_in, forget, open_ledger
from uniapl.data.importing.records import Request, Source
from uniapl.data.importing.rows import RowMaker, prompt_key
from uniapl.data.importing.scan import scan
from uniapl.data.importing.shards import PART, Shard
from uniapl.data.progress import EVERY, Bar
from uniapl.data.reader import expand


def run_import(request: Request, bar: Bar, overwrite: bool = False) -> Ledger:
    """Import, or finish an import that was interrupted; one that is finished is left as it is.

    Shards are kept as soon as they are whole. The same rows make the same bytes, however often the import was
    interrupted. The memory it takes depends on the largest row and on `request.heldout`, not on the number of rows.

    Raises:
        DataError: a source or, where bad rows are errors, a row cannot be used; the folder holds something else.
    """
    try:
        sources = _sources(request)
        with alone_in(request.out):
            if overwrite:
                forget(request.out)
            return _Import(request, sources, bar).run()
    except OSError as error:
        raise DataError(
            f"{error.filename or request.out}: {error.strerror or error}; allowed: files that can be read, "
            "and room to write; the same command goes on"
        ) from None


def _sources(request: Request) -> list[tuple[Source, Format]]:
    """What is named, in that order, a glob's matches sorted; each with its format."""
    found: list[Source] = []
    for name in dict.fromkeys(request.inputs):
        hub = name.startswith(PREFIX)
        found += (
            [HubSource(name)] if hub else map(FileSource, expand([name], f"files that end in {', '.join(ENDINGS)}"))
        )
    return [(source, format_of(source.name, source.columns, request)) for source in found]


class _Import:
    def __init__(self, request: Request, sources: list[tuple[Source, Format]], bar: Bar) -> None:
        self._request, self._sources, self._bar = request, sources, bar
        self._maker = RowMaker(request)

    def run(self) -> Ledger:
        inputs = []
        for source, form in self._sources:
            self._bar.stage(f"checking {source.name}", source.size)
            inputs.append(source.identity(self._bar.at) | {"format": form.name})
        self._ledger = open_ledger(self._request, inputs)
        if self._ledger.finished:
            self._bar.say(f"{self._request.out}: this import is finished already; nothing to do")
            return self._ledger
        try:
            self._begin()
            self._write()
        except BaseException:
            for part in self._request.out.glob("*.arrow" + PART):
                part.unlink()
            raise
        self._ledger.finished = True
        self._ledger.save(self._request.out)
        return self._ledger

    def _begin(self) -> None:
        ledger, request = self._ledger, self._request
        if not ledger.files:
            ledger.save(request.out)  # from here on the folder is this import's
        else:
            self._bar.say(f"{request.out}: going on after {ledger.shards} finished shards")
        if (request.heldout or request.shards) and ledger.scan is None:
            rows = (row for row, _ in self._rows("looking through", 0, 0, Counts()))
            ledger.scan = scan(rows, request.heldout, request.out)
            ledger.files += ledger.scan.pop("files")
            ledger.save(request.out)
        if request.shards and ledger.scan and request.shards > ledger.scan["training"]:
            raise DataError(f"--shards: got {request.shards}; allowed: <= {ledger.scan['training']}, the training rows")

    def _write(self) -> None:
        """From the ledger's place on: shard after shard, each entered in the ledger when it is whole."""
        ledger = self._ledger
        size, held = _sizes(self._request, ledger.scan), set(ledger.scan["keys"] if ledger.scan else [])
        shard: Shard | None = None
        for row, place in self._rows("importing", ledger.source, ledger.row, ledger.counts):
            if prompt_key(row["messages"]) in held:
                ledger.counts.held_back += 1
                continue
            shard = shard or Shard(self._request.out, ledger.shards)
            shard.add(row)
            ledger.counts.imported += 1
            ledger.counts.pairs += "rejected" in row
            ledger.counts.without_response += row["response"] is None
            if shard.rows == size(ledger.shards):
                self._finish(shard, *place)
                shard = None
        if shard is not None:
            self._finish(shard, len(self._sources), -1)  # bad rows behind its last one are counted already
        if not ledger.shards:
            reasons = "; ".join(f"{reason}: {n['rows']}" for reason, n in ledger.counts.skipped.items()) or "none there"
            raise DataError(f"{self._request.inputs[0]}: no row could be used ({reasons}); allowed: at least one")

    def _finish(self, shard: Shard, source: int, row: int) -> None:
        ledger = self._ledger
        ledger.files += shard.close()
        ledger.shards, ledger.source, ledger.row = ledger.shards + 1, source, row + 1
        ledger.save(self._request.out)

    def _rows(
        self, title: str, first: int, start: int, counts: Counts
    ) -> Iterator[tuple[dict[str, Any], tuple[int, int]]]:
        """Sound rows from row `start` of source `first` on, each with the numbers of its source and row there."""
        for number, (source, form) in enumerate(self._sources[first:], start=first):
            self._bar.stage(f"{title} {Path(source.name).name}", source.size)
            for record in source.rows(start, self._maker.columns(form)):
                if record.row % EVERY == 0:
                    self._bar.at(record.at, record.row)
                try:
                    row = self._maker.make(record, form, source)
                except DataError as error:
                    if self._request.on_bad_row == "error":
                        raise DataError(f"{error} (or leave such rows out: --on-bad-row skip)", error.reason) from None
                    counts.skip(error)
                    continue
                yield row, (number, record.row)
            start = 0


def _sizes(request: Request, scanned: dict[str, Any] | None) -> Callable[[int], int]:
    """How many rows the shard with a number has, at most."""
    if not request.shards or scanned is None:
        return lambda _: request.rows_per_shard
    shards, rows = request.shards, scanned["training"]
    return lambda number: (number + 1) * rows // shards - number * rows // shards
