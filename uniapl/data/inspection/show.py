"""What `uniapl data inspect` prints."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uniapl.data.encoding import ChatEncoder, check_template
from uniapl.data.inspection.measure import QUANTILES, measure, open_shards
from uniapl.data.inspection.samples import samples
from uniapl.data.progress import Bar

WIDTH = 100
TRAINED, CONTEXT = "bold green", "dim"
OPEN, CLOSE = "⟦", "⟧"
"""Around what is trained on, where there is no colour."""
_MOST = 2000
"""Characters of a part that are shown."""
_BAR = 30
_TITLES = {"shards": "prompts and demonstrations", "comparisons": "comparisons (preference pairs)"}


def inspect(shards: Iterable[str], model: str | None, rows: int, as_json: bool, console: Console | None = None) -> None:
    """Print schema, counts, lengths, duplicates and some rows of shards and comparisons.

    Args:
        shards: paths or globs.
        model: whose tokenizer and chat template to use; None: lengths in characters, messages as they are stored.
        rows: of each kind, to show.
        as_json: one JSON object instead of tables.
        console: to print on.

    Raises:
        DataError: a file or the tokenizer cannot be used.
    """
    found, encoder = open_shards(shards), None
    if model is not None:
        check_template(model)
        encoder = ChatEncoder.from_folder(model)
    console = console or Console(highlight=False)
    kinds = []
    with Bar() as bar:
        for kind, files in found.items():
            measured, reader = measure(kind, files, encoder, bar)
            kinds.append(measured | {"samples": samples(reader, rows, encoder)})
    if as_json:
        console.out(json.dumps({"model": model, "kinds": kinds}, indent=1, ensure_ascii=True))
        return
    for measured in kinds:
        _show(measured, model, console)


def _show(found: dict[str, Any], model: str | None, console: Console) -> None:
    width = min(console.width, WIDTH)
    console.print(Text(_TITLES[found["kind"]], style="bold"))
    facts = Table.grid(padding=(0, 2, 0, 0))
    for label, text in _facts(found):
        facts.add_row(Text(label, style="bold"), Text(text))
    console.print(facts, width=width)
    for name, lengths in found["lengths"].items():
        console.print(Text(f"\n{name}, {found['unit']}", style="bold"))
        values = "  ".join(f"{q} {lengths[q]:,}" for q in [*QUANTILES, "mean"])
        console.print(Text(values), width=width)
        console.print(_histogram(lengths["histogram"]), width=width)
    for sample in found["samples"]:
        _show_sample(sample, console)
    if found["samples"] and model is None:
        console.print(
            Text("\n--model FOLDER shows rows with its chat template, as the model will see them", style="dim")
        )
    console.print()


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    files, counts = found["files"], dict(found["counts"])
    size = sum(file["bytes"] for file in files) / 2**20
    schema = ", ".join(f"{name} {_short(kind)}" for name, kind in found["schema"].items())
    duplicates = ", ".join(f"{n:,} {name}" for name, n in found["duplicates"].items())
    facts = [
        ("files", f"{len(files)}, {size:.1f} MiB: {', '.join(file['name'].rsplit('/', 1)[-1] for file in files[:6])}"),
        ("schema", schema),
        ("rows", f"{counts.pop('rows'):,}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items())),
        ("repeated", duplicates),
    ]
    if len(files) > 6:
        facts[0] = (facts[0][0], facts[0][1] + ", …")
    facts += [
        ("bad", f"{bad['rows']:,}: {reason}; the first: {bad['first']}") for reason, bad in found["bad rows"].items()
    ]
    return [(label, printable(text)) for label, text in facts]


def _short(kind: str) -> str:
    """A type without what Arrow says of the fields in it."""
    return kind.replace(" not null", "").replace("item: ", "")


def _histogram(bins: list[dict[str, int]]) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0))
    most = max(bin["rows"] for bin in bins)
    for bin in bins:
        length = -(-_BAR * bin["rows"] // most)
        label = f"{bin['from']:,}–{2 * bin['from'] - 1:,}" if bin["from"] > 1 else "0–1"
        table.add_row(Text(label, justify="right"), Text("█" * length, style="cyan"), Text(f"{bin['rows']:,}"))
    return table


def _show_sample(sample: dict[str, Any], console: Console) -> None:
    console.print(Text(f"\nrow {sample['row']}  {sample.get('id', '')}", style="bold"))
    if "error" in sample:
        console.print(Text(printable(sample["error"]), style="red"))
        return
    coloured = console.color_system is not None and not console.no_color
    for part in sample["parts"]:
        text = printable(part["text"][:_MOST])
        if len(part["text"]) > _MOST:
            text += f" … ({len(part['text']) - _MOST:,} characters more)"
        if part["trained"] and not coloured:
            text = f"{OPEN}{text}{CLOSE}"
        style = TRAINED if part["trained"] else CONTEXT
        console.print(Text.assemble((f"{part['name']}: ", "bold"), (text, style)))
    if not any(part["trained"] for part in sample["parts"]):
        console.print(Text("no response: a prompt alone", style="bold"))


def printable(text: str) -> str:
    """The text with characters that a terminal would obey, or that change the direction of writing, spelled out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
