"""Prompts and demonstrations without end, resumable to the row."""

import json
from pathlib import Path

import pytest
from helpers_shards import row, word_tokenizer, write_ipc

from uniapl.config import Config
from uniapl.data.encoding import ChatEncoder
from uniapl.data.errors import DataError
from uniapl.data.reader import ShardReader
from uniapl.data.sources import DemonstrationSource, PromptSource, heldout_prompts, open_sources
from uniapl.feed import ROW_COUNTERS
from uniapl.mixing import MixingQueue


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(word_tokenizer())


@pytest.fixture
def reader(tmp_path: Path) -> ShardReader:
    return _reader(tmp_path, [row(i) for i in range(20)])


def _reader(folder: Path, rows: list[dict]) -> ShardReader:
    half = len(rows) // 2
    paths = [write_ipc(folder / f"{i}.arrow", part) for i, part in enumerate((rows[:half], rows[half:])) if part]
    return ShardReader(paths)


def _sources(reader: ShardReader, encoder: ChatEncoder, seed: int = 0) -> list[PromptSource | DemonstrationSource]:
    return [PromptSource(reader, encoder, seed, 32, 8), DemonstrationSource(reader, encoder, seed, 32, 8)]


def test_a_prompt_carries_all_that_a_rollout_needs(reader: ShardReader, encoder: ChatEncoder) -> None:
    source = PromptSource(reader, encoder, 0, 32, 8)
    prompts = {prompt.id: prompt for prompt in (source.next() for _ in range(20))}
    assert len(prompts) == 20
    prompt = prompts["r4"]
    assert prompt.messages == [{"role": "user", "content": "hello 4"}]
    assert prompt.token_ids == encoder.prompt_ids(prompt.messages)
    assert (prompt.verifier, prompt.expert_response) == ('{"instructions": []}', "world 4")
    assert prompt.expert_ids == encoder.response_ids("world 4")
    assert (prompts["r5"].expert_response, prompts["r5"].expert_ids) == (None, None)


def test_demonstrations_are_the_rows_with_a_response(reader: ShardReader, encoder: ChatEncoder) -> None:
    source = DemonstrationSource(reader, encoder, 0, 32, 8)
    made = [source.next() for _ in range(10)]
    assert {d.id for d in made} == {f"r{i}" for i in range(0, 20, 2)}
    assert all(d.response_ids[-1] == encoder.end_of_turn for d in made)
    assert source.state_dict()["skipped"] == {}
    assert source.next().id in {d.id for d in made}
    assert source.state_dict()["epoch"] == 1


@pytest.mark.parametrize("kind", [0, 1], ids=["prompts", "demonstrations"])
def test_each_epoch_holds_every_row_in_another_order(reader: ShardReader, encoder: ChatEncoder, kind: int) -> None:
    rows = [20, 10][kind]
    source = _sources(reader, encoder)[kind]
    epochs = [[source.next().id for _ in range(rows)] for _ in range(3)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("kind", [0, 1], ids=["prompts", "demonstrations"])
@pytest.mark.parametrize("taken", [0, 1, 19, 20, 33])
def test_a_saved_source_goes_on_as_if_undisturbed(
    reader: ShardReader, encoder: ChatEncoder, kind: int, taken: int
) -> None:
    undisturbed, stopped, resumed = (_sources(reader, encoder)[kind] for _ in range(3))
    for source in (undisturbed, stopped):
        for _ in range(taken):
            source.next()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert [resumed.next() for _ in range(50)] == [undisturbed.next() for _ in range(50)]
    assert resumed.state_dict() == undisturbed.state_dict()


def test_the_seed_decides_the_order(reader: ShardReader, encoder: ChatEncoder) -> None:
    first, again, other = (PromptSource(reader, encoder, seed, 32, 8) for seed in (1, 1, 2))
    orders = [[source.next().id for _ in range(20)] for source in (first, again, other)]
    assert orders[0] == orders[1] != orders[2]


def test_a_cursor_of_as_many_rows_in_other_shards_is_refused(
    reader: ShardReader, encoder: ChatEncoder, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = _reader(tmp_path / "other", [row(i, response="Something else") for i in range(20)])
    with pytest.raises(DataError, match=r"cursor of prompts: shards 2 of \d+ bytes \(\w+\); allowed: 2 of \d+ bytes "):
        PromptSource(reader, encoder, 0, 32, 8).load_state_dict(PromptSource(other, encoder, 0, 32, 8).state_dict())


@pytest.mark.parametrize(("name", "value"), [("rows", 21), ("seed", 5)])
def test_a_cursor_of_another_data_set_or_seed_is_refused(
    reader: ShardReader, encoder: ChatEncoder, name: str, value: int
) -> None:
    source = PromptSource(reader, encoder, 0, 32, 8)
    with pytest.raises(
        DataError, match=rf"saved cursor of prompts: {name} {value}; allowed: {[20, 0][name == 'seed']}"
    ):
        source.load_state_dict(source.state_dict() | {name: value})


LONG = "hello " * 40
BAD = {
    "prompt too long": (
        {"messages": [{"role": "user", "content": LONG}]},
        "row 0: column messages: 45 tokens; allowed: <= 32 (data.max_prompt_tokens)",
    ),
    "response too long": (
        {"response": LONG},
        "row 0: column response: 41 tokens; allowed: <= 8 (data.max_response_tokens)",
    ),
    "empty response": ({"response": ""}, "row 0: column response: empty; allowed: text, or null for none"),
    "bad verifier": ({"verifier": "[]"}, "row 0: column verifier: a JSON list; allowed: a JSON object"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_ends_the_run_with_its_place(tmp_path: Path, encoder: ChatEncoder, reason: str) -> None:
    changes, message = BAD[reason]
    source = DemonstrationSource(_reader(tmp_path, [row(0, **changes)]), encoder, 0, 32, 8)
    with pytest.raises(DataError) as caught:
        source.next()
    assert str(caught.value) == f"{tmp_path / '1.arrow'}: {message}"


@pytest.mark.parametrize("reason", BAD)
def test_or_it_is_skipped_and_counted(tmp_path: Path, encoder: ChatEncoder, reason: str) -> None:
    changes, _ = BAD[reason]
    rows = [row(0, **changes), row(2), row(4)]
    source = DemonstrationSource(_reader(tmp_path, rows), encoder, 0, 32, 8, on_bad_row="skip")
    made = [source.next().id for _ in range(5)]
    assert set(made) == {"r2", "r4"}
    epoch = source.state_dict()["epoch"]
    assert epoch == 2
    assert list(source.skipped) == [reason]
    assert source.skipped[reason] in (epoch, epoch + 1)  # once in each whole epoch
    resumed = DemonstrationSource(_reader(tmp_path, rows), encoder, 0, 32, 8, on_bad_row="skip")
    resumed.load_state_dict(source.state_dict())
    assert resumed.skipped == source.skipped


def test_a_long_response_does_not_harm_a_prompt(tmp_path: Path, encoder: ChatEncoder) -> None:
    source = PromptSource(_reader(tmp_path, [row(0, response=LONG)]), encoder, 0, 32, 8)
    prompt = source.next()
    assert prompt.expert_response == LONG
    assert prompt.expert_ids == encoder.response_ids(LONG)[:8]
    resumed = PromptSource(_reader(tmp_path, [row(0, response=LONG)]), encoder, 0, 32, 8)
    resumed.load_state_dict(source.state_dict())
    assert source.cut == resumed.cut == 1


def test_what_was_passed_over_or_cut_is_among_the_queues_counters(tmp_path: Path, encoder: ChatEncoder) -> None:
    reader = _reader(tmp_path, [row(0, response=LONG), row(2, messages=[]), row(4)])
    limits = {"max_prompt_tokens": 32, "max_response_tokens": 8, "on_bad_row": "skip"}
    prompts, demonstrations = (kind(reader, encoder, 0, **limits) for kind in (PromptSource, DemonstrationSource))
    bounds = {"max_staleness": 0, "lease_s": 1.0, "max_regenerations": 0, "max_resamples": 0}
    queue = MixingQueue(prompts, demonstrations, needs=lambda step: (6, 3), **bounds)
    leased = [queue.lease("a", now=0.0).task.prompt.id for _ in range(6)]
    assert sorted(leased) == ["r0"] * 3 + ["r4"] * 3, "in three epochs"
    assert [demonstrations.next().id for _ in range(3)] == ["r4"] * 3
    counted = {name: queue.counters()[name] for name in ROW_COUNTERS}
    assert min(counted.values()) > 1
    assert counted == {
        "skipped_prompts": prompts.skipped.total(),
        "skipped_demonstrations": demonstrations.skipped.total(),
        "cut_experts": 3,
    }


def test_an_epoch_with_nothing_usable_is_an_error(tmp_path: Path, encoder: ChatEncoder) -> None:
    reader = _reader(tmp_path, [row(0, response=""), row(2, response=" "), row(4, verifier="1")])
    source = DemonstrationSource(reader, encoder, 0, 32, 8, on_bad_row="skip")
    with pytest.raises(DataError) as caught:
        source.next()
    assert str(caught.value) == (
        "demonstrations: no usable row among all 3 (skipped: 1 bad verifier, 2 empty response); allowed: at least one"
    )


def test_shards_without_any_response_have_no_demonstrations(tmp_path: Path, encoder: ChatEncoder) -> None:
    source = DemonstrationSource(_reader(tmp_path, [row(1), row(3)]), encoder, 0, 32, 8)
    with pytest.raises(DataError, match=r"demonstrations: no usable row among all 2 \(skipped: none was bad\)"):
        source.next()


def _config(folder: Path, **data: object) -> Config:
    word_tokenizer().save_pretrained(folder / "model")
    write_ipc(folder / "train.arrow", [row(i) for i in range(6)])
    write_ipc(folder / "heldout.arrow", [row(i) for i in range(100, 112)])
    tree = {
        "model": {"path": str(folder / "model")},
        "data": {"train": [str(folder / "train.arrow")], "heldout": [str(folder / "heldout.arrow")]} | data,
    }
    return Config.model_validate(tree)


def test_sources_are_opened_from_the_configuration(tmp_path: Path) -> None:
    prompts, demonstrations = open_sources(_config(tmp_path))
    assert {prompts.next().id for _ in range(6)} == {f"r{i}" for i in range(6)}
    assert {demonstrations.next().id for _ in range(3)} == {"r0", "r2", "r4"}


def test_heldout_prompts_are_the_same_in_every_run(tmp_path: Path) -> None:
    config = _config(tmp_path)
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 99})})
    chosen = heldout_prompts(config, 8)
    assert chosen == heldout_prompts(other, 8)
    assert len({prompt.id for prompt in chosen}) == 8
    assert chosen[:3] == heldout_prompts(config, 3)
    assert heldout_prompts(config, 0) == []


def test_more_heldout_prompts_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.heldout: 12 usable rows; allowed: >= 13 \(evaluation\.prompts\)"):
        heldout_prompts(_config(tmp_path), 13)
