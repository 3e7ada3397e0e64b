"""Messages and responses as token ids, by the tokenizer's own template."""

from pathlib import Path

import pytest
from helpers_shards import TEMPLATE, word_tokenizer

from uniapl.data.encoding import ChatEncoder
from uniapl.data.errors import DataError

HELLO = [{"role": "user", "content": "hello world"}]


def _words(ids: list[int]) -> list[str]:
    return word_tokenizer().convert_ids_to_tokens(ids)


def test_a_prompt_ends_where_the_answer_begins() -> None:
    ids = ChatEncoder(word_tokenizer()).prompt_ids(HELLO)
    assert _words(ids) == ["<|im_start|>", "user", "hello", "world", "<|im_end|>", "<|im_start|>", "assistant"]


def test_a_response_ends_with_the_templates_own_end_of_turn() -> None:
    """Not with the end-of-sequence token, where the two differ."""
    encoder = ChatEncoder(word_tokenizer())
    assert encoder.tokenizer.eos_token == "<|endoftext|>"
    assert _words(encoder.response_ids("hello world")) == ["hello", "world", "<|im_end|>"]


def test_a_template_without_end_of_turn_falls_back_on_end_of_sequence() -> None:
    encoder = ChatEncoder(word_tokenizer("{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"))
    assert _words(encoder.response_ids("hello")) == ["hello", "<|endoftext|>"]


def test_decoding_leaves_special_tokens_out() -> None:
    encoder = ChatEncoder(word_tokenizer())
    assert encoder.decode(encoder.response_ids("hello world")) == "hello world"


def test_text_that_spells_a_special_token_ends_no_turn() -> None:
    encoder = ChatEncoder(word_tokenizer())
    assert _words(encoder.response_ids("hello <|im_end|> world")) == ["hello", "<unk>", "world", "<|im_end|>"]


def test_a_template_that_refuses_the_messages_is_named() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    encoder = ChatEncoder(word_tokenizer(refusing + TEMPLATE))
    with pytest.raises(DataError, match="column messages: the chat template refuses them: no system turn"):
        encoder.prompt_ids([{"role": "system", "content": "hello"}])


def test_a_folder_without_a_chat_template(tmp_path: Path) -> None:
    word_tokenizer(template=None).save_pretrained(tmp_path)
    with pytest.raises(DataError) as caught:
        ChatEncoder.from_folder(tmp_path)
    assert str(caught.value) == f"{tmp_path}: no chat template; allowed: a tokenizer with one"


def test_a_folder_is_read_with_its_template(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    encoder = ChatEncoder.from_folder(tmp_path)
    assert encoder.tokenizer.chat_template == TEMPLATE
    assert encoder.prompt_ids(HELLO) == ChatEncoder(word_tokenizer()).prompt_ids(HELLO)


def test_no_folder_and_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none: no such folder; allowed: a Hugging Face folder"):
        ChatEncoder.from_folder(tmp_path / "none")
    with pytest.raises(DataError, match=r"no readable tokenizer \(.*allowed: a Hugging Face folder") as caught:
        ChatEncoder.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
