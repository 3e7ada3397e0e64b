"""The frozen reward model in POLAR's format, against a direct computation with the same random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_discriminator import compare, tiny_reward_model
from helpers_tiny import tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from uniapl.config_errors import ConfigError
from uniapl.discriminators.reference_reward import ReferenceRewardDiscriminator, resolve_reward_model

EXPERT = "the fox says yes"
RESPONSES = ["the red fox says no", "", EXPERT, "ß 漢字 🙂 \ud800", "tree " * 30]
PROMPT = "Be brief.\nWhat does the fox say?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def discriminator(folder: Path) -> ReferenceRewardDiscriminator:
    return ReferenceRewardDiscriminator(resolve_reward_model(str(folder)), threads=1, cache_entries=2)


def direct(folder: Path, text: str) -> float:
    """The head's value at the last token of one sequence alone, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    ids = tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        return float(model.score(hidden)[0, -1, 0])


def test_scores_are_those_of_the_written_out_sequence(folder, discriminator):
    clean = [text.encode("utf-8", "replace").decode() for text in [EXPERT, *RESPONSES]]
    written = [f"{PROMPT}\n{EXPERT}<|reward|>{PROMPT}\n{text}<|im_end|>" for text in clean]
    expected = [direct(folder, text) for text in written]
    [found] = discriminator.scores([compare(EXPERT, RESPONSES)])
    assert [found.reference, *found.responses] == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in found.responses}) == len(RESPONSES), "they tell responses apart"
    assert found.responses[2] == found.reference


def test_prompt_reference_and_response_all_count(discriminator):
    compared = [
        compare(EXPERT, ["yes"]),
        compare("no", ["yes"]),
        compare(EXPERT, ["no"]),
        compare(EXPERT, ["yes"], "?"),
    ]
    scores = [found.responses[0] for found in discriminator.scores(compared)]
    assert len({round(score, 4) for score in scores}) == 4


def test_a_score_does_not_depend_on_what_else_is_in_the_batch(discriminator):
    groups = [compare(EXPERT, RESPONSES), compare("no", [], "say"), compare("tree " * 9, RESPONSES[:2], "say yes")]
    together = discriminator.scores(groups)
    for group, found in zip(groups, together, strict=True):
        [alone] = discriminator.scores([group])
        assert alone.reference == found.reference
        assert alone.responses == found.responses
    assert discriminator.scores([]) == []


def test_an_experts_own_score_is_computed_once_and_few_are_kept(discriminator, monkeypatch):
    read: list[str] = []
    input_ids = discriminator.input_ids  # a spy around the real one: how often it ran shows in no result
    monkeypatch.setattr(discriminator, "input_ids", lambda *texts: read.append(texts[1:]) or input_ids(*texts))
    for expert in ["one", "one", "two", "three", "one"]:
        discriminator.scores([compare(expert, ["response", "response"])])
    own = [expert for expert, candidate in read if expert == candidate]
    assert own == ["one", "two", "three", "one"]
    assert len(read) == len(own) + 5, "equal responses are computed once"
    assert len(discriminator._references) == 2


def test_text_that_spells_special_tokens_stays_text(discriminator):
    """Else a policy could write an end and a fresh comparison into its response."""
    tokenizer = discriminator._tokenizer
    ids = discriminator.input_ids("p", "r", f"<|im_end|>{tokenizer.pad_token}")
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in ids


class TestLongInputs:
    """The longest input is 256 tokens here, so a response may have 64."""

    def test_responses_keep_their_beginning_and_the_prompt_its_end(self, discriminator):
        prompt = "".join(f"{i}," for i in range(400))
        tokenizer = discriminator._tokenizer
        ids = discriminator.input_ids(prompt, "a" * 500, "b" * 30)
        assert 254 <= len(ids) <= 256
        first, second = tokenizer.decode(ids[:-1]).split("<|reward|>")
        assert first.endswith("398,399,\n" + "a" * 64) and second.endswith("398,399,\n" + "b" * 30)
        kept = [half[: half.index("\n")] for half in (first, second)]
        assert kept[0] == kept[1] and prompt.endswith(kept[0])

    def test_two_long_responses_leave_half_the_room_to_the_prompt(self, discriminator):
        ids = discriminator.input_ids("p" * 900, "a" * 900, "b" * 900)
        text = discriminator._tokenizer.decode(ids[:-1])
        assert len(ids) <= 256
        assert (text.count("a"), text.count("b")) == (64 + "<|reward|>".count("a"), 64)
        assert text.count("p") >= 2 * 55

    def test_they_are_scored(self, discriminator):
        [found] = discriminator.scores([compare("a" * 900, ["b" * 900], "p" * 900)])
        assert found.reference != found.responses[0]


def test_the_model_is_frozen(discriminator):
    assert not any(parameter.requires_grad for parameter in discriminator._model.parameters())
    assert not discriminator._model.training


def test_the_end_token_may_be_the_padding_token(folder, discriminator, tmp_path):
    same = edited(Path(shutil.copytree(folder, tmp_path / "same")), pad_token_id=discriminator._tokenizer.eos_token_id)
    groups = [compare(EXPERT, RESPONSES)]
    [expected], [found] = discriminator.scores(groups), ReferenceRewardDiscriminator(same).scores(groups)
    assert found.responses == pytest.approx(expected.responses, abs=1e-5)


def test_a_model_may_name_the_token_that_its_head_reads(tmp_path):
    discriminator = ReferenceRewardDiscriminator(tiny_reward_model(tmp_path, reward_token_id=7))
    assert discriminator.input_ids("p", "r", "y")[-1] == 7


def test_a_model_that_overflows_is_an_error(folder):
    broken = ReferenceRewardDiscriminator(folder)
    broken._model.score.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="the reward model gave a value that is not finite"):
        broken.scores([compare(EXPERT, ["text"])])


def edited(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "got null; allowed: a folder"),
        (lambda folder: folder / "nowhere", "nowhere/config.json is missing; allowed: a Hugging Face folder"),
        (tiny_model, "which is Qwen3ForCausalLM with 2 labels; allowed: a Hugging Face folder of a sequence cl"),
        (lambda folder: tiny_reward_model(folder, labels=3), "Qwen3ForSequenceClassification with 3 labels; allowed"),
        (lambda folder: edited(tiny_reward_model(folder), model_type="none_such"), "none_such"),
    ],
)
def test_a_folder_that_is_no_reward_model_is_one_line(tmp_path, make, message):
    name = make(tmp_path)
    with pytest.raises(ConfigError) as error:
        resolve_reward_model(None if name is None else str(name))
    assert str(error.value).startswith("objective.adversarial.reward_model: got ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    tiny_reward_model(tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(
        ConfigError, match=r"objective\.adversarial\.reward_model: got .* it holds no tokenizer; allowed"
    ):
        resolve_reward_model(str(tmp_path))
