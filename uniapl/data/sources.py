"""Endless, resumable streams of prompts and demonstrations over shuffled shards.

A source's cursor is (epoch, position): every epoch is another seeded shuffle of all rows, and what
follows a saved cursor is the same as if nothing had been interrupted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from uniapl.config import Config
from uniapl.data.comparisons import Pair
from uniapl.data.encoding import ChatEncoder
from uniapl.data.errors import DataError
from uniapl.data.reader import Row, ShardReader
from uniapl.data.shards import local_shards
from uniapl.data.shuffle import permutation
from uniapl.records import Demonstration, Prompt

OnBadRow = Literal["error", "skip"]
Item = TypeVar("Item")
HELDOUT_SEED = 0


class Cursor:
    """A position in the shuffled rows of a reader, going on endlessly over epochs.

    `skipped` counts, by reason, the bad rows that were passed over.
    """

    def __init__(self, reader: ShardReader, seed: int, stream: str, on_bad_row: OnBadRow) -> None:
        self.reader, self.seed, self.stream, self.on_bad_row = reader, seed, stream, on_bad_row
        self.skipped: Counter[str] = Counter()
        self._go_to(epoch=0, position=0, usable=0)

    def advance(self, read: Callable[[int], Item | None]) -> Item:
        """What `read` makes of the next row of which it makes anything but None.

        Raises:
            DataError: a bad row, where bad rows are errors; a whole epoch without a usable row.
        """
        while True:
            if self.position == len(self.reader):
                self._next_epoch()
            row = self._shuffle(self.position)
            self.position += 1
            try:
                item = read(row)
            except DataError as error:
                if self.on_bad_row == "error":
                    raise
                self.skipped[error.reason] += 1
                continue
            if item is not None:
                self._usable += 1
                return item

    def state_dict(self) -> dict[str, Any]:
        """The cursor and the counts so far, as JSON-able values."""
        return {
            "rows": len(self.reader),
            "shards": self.reader.fingerprint,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "usable": self._usable,
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved.

        Raises:
            DataError: it was saved with other shards or another seed.
        """
        for name, own in (("rows", len(self.reader)), ("shards", self.reader.fingerprint), ("seed", self.seed)):
            if state.get(name, own) != own:
                raise DataError(f"saved cursor of {self.stream}: {name} {state[name]}; allowed: {own}, as in this run")
        self.skipped = Counter(state["skipped"])
        self._go_to(state["epoch"], state["position"], state["usable"])

    def _next_epoch(self) -> None:
        if self._usable == 0:
            counts = ", ".join(f"{n} {reason}" for reason, n in sorted(self.skipped.items())) or "none was bad"
            raise DataError(
                f"{self.stream}: no usable row among all {len(self.reader)} (skipped: {counts}); allowed: at least one"
            )
        self._go_to(self.epoch + 1, position=0, usable=0)

    def _go_to(self, epoch: int, position: int, usable: int) -> None:
        self.epoch, self.position, self._usable = epoch, position, usable
        self._shuffle = permutation(len(self.reader), self.seed, self.stream, epoch)


class PromptSource:
    """Prompts over all rows, with the expert response where there is one.

    A prompt of more than `max_prompt_tokens` tokens is a bad row. An expert response of more than
    `max_response_tokens` is not: `expert_ids` ends there, and it is counted.
    """

    def __init__(
        self,
        reader: ShardReader,
        encoder: ChatEncoder,
        seed: int,
        max_prompt_tokens: int,
        max_response_tokens: int,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        self.encoder = encoder
        self.max_prompt_tokens, self.max_response_tokens = max_prompt_tokens, max_response_tokens
        self.cut = 0
        """Expert responses of which `expert_ids` holds the beginning alone, so far."""
        self._cursor = Cursor(reader, seed, "prompts", on_bad_row)

    @property
    def skipped(self) -> Counter[str]:
        return self._cursor.skipped

    def next(self) -> Prompt:
        """The next prompt, endlessly.

        Raises:
            DataError: a bad row, where bad rows are errors; a whole epoch without a usable row.
        """
        return self._cursor.advance(self._read)

    def _read(self, index: int) -> Prompt:
        row = self._cursor.reader[index]
        ids = prompt_ids(row, self.encoder, self.max_prompt_tokens)
        expert = None if row.response is None else self.encoder.response_ids(row.response)
        if expert is not None and len(expert) > self.max_response_tokens:
            expert = expert[: self.max_response_tokens]
            self.cut += 1
        return Prompt(row.id, row.messages, ids, row.verifier, row.response, expert)

    def state_dict(self) -> dict[str, Any]:
        """The cursor, JSON-able."""
        return self._cursor.state_dict() | {"cut": self.cut}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved; DataError if it belongs to other shards or another seed."""
        self._cursor.load_state_dict(state)
        self.cut = state.get("cut", 0)


class DemonstrationSource:
    """Demonstrations over the rows that have a response; prompt or response above its limit is a bad row."""

    def __init__(
        self,
        reader: ShardReader,
        encoder: ChatEncoder,
        seed: int,
        max_prompt_tokens: int,
        max_response_tokens: int,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        self.encoder = encoder
        self.max_prompt_tokens, self.max_response_tokens = max_prompt_tokens, max_response_tokens
        self._cursor = Cursor(reader, seed, "demonstrations", on_bad_row)

    @property
    def skipped(self) -> Counter[str]:
        return self._cursor.skipped

    def next(self) -> Demonstration:
        """The next demonstration, endlessly.

        Raises:
            DataError: a bad row, where bad rows are errors; a whole epoch without a usable row.
        """
        return self._cursor.advance(self._read)

    def _read(self, index: int) -> Demonstration | None:
        if not self._cursor.reader.has_response(index):
            return None
        row = self._cursor.reader[index]
        prompt = prompt_ids(row, self.encoder, self.max_prompt_tokens)
        response = self.encoder.response_ids(row.response or "")
        if len(response) > self.max_response_tokens:
            raise DataError(
                f"{row.where}: column response: {len(response)} tokens; allowed: <= {self.max_response_tokens} "
                "(data.max_response_tokens)",
                "response too long",
            )
        return Demonstration(row.id, prompt, response)

    def state_dict(self) -> dict[str, Any]:
        """The cursor, JSON-able."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved; DataError if it belongs to other shards or another seed."""
        self._cursor.load_state_dict(state)


def prompt_ids(row: Row | Pair, encoder: ChatEncoder, max_tokens: int) -> list[int]:
    """The row's prompt as token ids.

    Raises:
        DataError: it is too long, or the chat template refuses it.
    """
    try:
        ids = encoder.prompt_ids(row.messages)
    except DataError as error:
        raise DataError(f"{row.where}: {error}", error.reason) from None
    if len(ids) > max_tokens:
        raise DataError(
            f"{row.where}: column messages: {len(ids)} tokens; allowed: <= {max_tokens} (data.max_prompt_tokens)",
            "prompt too long",
        )
    return ids


def open_sources(config: Config) -> tuple[PromptSource, DemonstrationSource]:
    """The training shards as prompts and as demonstrations.

    Raises:
        DataError: a shard or the tokenizer cannot be used.
    """
    data, seed = config.data, config.run.seed
    reader, encoder = ShardReader(local_shards(config, "train")), ChatEncoder.from_folder(config.model.path)
    return (
        PromptSource(reader, encoder, seed, data.max_prompt_tokens, data.max_response_tokens, data.on_bad_row),
        DemonstrationSource(reader, encoder, seed, data.max_prompt_tokens, data.max_response_tokens, data.on_bad_row),
    )


def heldout_prompts(config: Config, n: int) -> list[Prompt]:
    """`n` different prompts of the held-out shards: the same ones in every run, whatever its seed.

    Raises:
        DataError: a shard or the tokenizer cannot be used, or there are fewer than `n` usable rows.
    """
    if n == 0:
        return []
    reader, encoder = ShardReader(local_shards(config, "heldout")), ChatEncoder.from_folder(config.model.path)
    data = config.data
    source = PromptSource(
        reader, encoder, HELDOUT_SEED, data.max_prompt_tokens, data.max_response_tokens, data.on_bad_row
    )
    prompts: list[Prompt] = []
    while len(prompts) < n:
        prompt = source.next()
        if source.state_dict()["epoch"] > 0:
            raise DataError(f"data.heldout: {len(prompts)} usable rows; allowed: >= {n} (evaluation.prompts)")
        prompts.append(prompt)
    return prompts
