"""Model folders: chat templates that fail, run away or leave the prompt out; tokenizers and weights that are torn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_bad_input import complaint
from helpers_shards import TEMPLATE, word_tokenizer
from helpers_toy import toy_config

from uniapl.data import encoding
from uniapl.data.encoding import ChatEncoder, check_template
from uniapl.data.errors import DataError

ALLOWED = "; allowed: one that renders a user's and an assistant's turn"
NO_TEMPLATE = "no chat template; allowed: a tokenizer with one"

# name: (the template, how what is said of the folder begins)
TEMPLATES: dict[str, tuple[Any, str]] = {
    "none": (None, NO_TEMPLATE),
    "empty": ("", NO_TEMPLATE),
    "syntax": ("{% for %}", "chat template: Expected an expression, got 'end of statement block'" + ALLOWED),
    "not closed": ("{% if true %}", "chat template: Unexpected end of template. "),
    "unknown name": ("{{ nothing.at_all }}", "chat template: 'nothing' is undefined" + ALLOWED),
    "unknown filter": ("{{ messages|no_such }}", "chat template: No filter named 'no_such'." + ALLOWED),
    "unknown key": ("{{ messages[0].name.first }}", "chat template: 'dict object' has no attribute 'name'" + ALLOWED),
    "one message more": ("{{ messages[2].content }}", "chat template: list object has no element 2" + ALLOWED),
    "wrong type": (
        "{{ messages + 1 }}",
        'chat template: TypeError: can only concatenate list (not "int") to list' + ALLOWED,
    ),
    "division": ("{{ 1 / 0 }}", "chat template: ZeroDivisionError: division by zero" + ALLOWED),
    "raises": ("{{ raise_exception('two\nlines') }}", "chat template: two lines" + ALLOWED),
    "no answer allowed": (
        TEMPLATE + "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}",
        "chat template: one turn only" + ALLOWED,
    ),
    "calls itself": (
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "chat template: RecursionError: maximum recursion depth exceeded",
    ),
    "leaves the messages out": ("hello", "chat template: makes 'hello' of a message" + ALLOWED),
    "blank": (" \n", "chat template: makes ' ' of a message" + ALLOWED),
    "a number": (5, "chat template: TypeError: Can't compile non template nodes" + ALLOWED),
    "by name, without default": ({"tools": TEMPLATE}, "chat template: This model has multiple chat templates with no"),
    "reaches into Python": (
        "{{ ''.__class__.__mro__ }}",
        "chat template: access to attribute '__class__' of 'str' object is",
    ),
    "changes the messages": ("{{ messages.append(1) }}", "chat template: access to attribute 'append' of 'list'"),
    "reads a file": ("{% include '/etc/passwd' %}", "chat template: TypeError: no loader for this environment"),
    "long range": ("{% for i in range(10**9) %}{% endfor %}", "chat template: OverflowError: Range too big."),
    "loops for ever": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "chat template: took longer than 1 s" + ALLOWED,
    ),
    "multiplies for ever": ("{{ 7 ** 7 ** 77 }}", "chat template: "),
    "gigabytes": ("{{ 'x' * 10 ** 10 }}", "chat template: MemoryError"),
    "many characters": (
        "{{ 'x' * 20000000 }}",
        "chat template: it makes 20000000 characters of them; allowed: <=",
    ),
}


def with_template(folder: Path, template: Any) -> Path:
    word_tokenizer(None).save_pretrained(folder)
    return edit(folder / "tokenizer_config.json", chat_template=template).parent


def edit(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_does_no_good(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "ever" in case:
        monkeypatch.setattr(encoding, "TEMPLATE_S", 1.0)  # the same limit, reached in one second and not in ten
    template, expected = TEMPLATES[case]
    folder = with_template(tmp_path / "m", template)
    with pytest.raises(DataError) as raised:
        check_template(folder)
    said = str(raised.value)
    assert said.startswith(f"{folder}: {expected}") and "\n" not in said and "allowed: " in said


def test_a_template_that_refuses_some_rows_is_told_with_the_row(tmp_path: Path) -> None:
    encoder = ChatEncoder(word_tokenizer(TEMPLATE + "{{ 1 / (messages[0].content | length - 5)  }}"))
    with pytest.raises(DataError) as raised:
        encoder.prompt_ids([{"role": "user", "content": "hello"}])
    assert str(raised.value) == (
        "column messages: the chat template refuses them: ZeroDivisionError: division by zero; "
        "allowed: turns that it takes"
    )
    assert raised.value.reason == "chat template"


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


NO_TOKENIZER = "no readable tokenizer ("
# name: (what is done to the folder, how what is said of it begins)
TOKENIZERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "torn": (lambda f: (f / "tokenizer.json").write_bytes(b'{"a'), NO_TOKENIZER),
    "empty": (lambda f: (f / "tokenizer.json").write_bytes(b""), NO_TOKENIZER),
    "a list": (lambda f: (f / "tokenizer.json").write_bytes(b"[]"), NO_TOKENIZER),
    "an empty object": (lambda f: (f / "tokenizer.json").write_bytes(b"{}"), NO_TOKENIZER),
    "bytes": (lambda f: (f / "tokenizer.json").write_bytes(b"\0\xff"), NO_TOKENIZER),
    "missing": (lambda f: (f / "tokenizer.json").unlink(), NO_TOKENIZER),
    "a link to itself": (lambda f: loop(f / "tokenizer.json"), NO_TOKENIZER),
    "settings torn": (lambda f: (f / "tokenizer_config.json").write_bytes(b'{"a'), NO_TOKENIZER),
    "settings a list": (lambda f: (f / "tokenizer_config.json").write_bytes(b"[]"), NO_TOKENIZER),
    "settings no UTF-8": (lambda f: (f / "tokenizer_config.json").write_bytes(b"\xff"), NO_TOKENIZER),
    "settings deep": (lambda f: (f / "tokenizer_config.json").write_bytes(b"[" * 100_000), NO_TOKENIZER),
    "class a number": (lambda f: edit(f / "tokenizer_config.json", tokenizer_class=5), NO_TOKENIZER),
    "end a number": (lambda f: edit(f / "tokenizer_config.json", eos_token=7), NO_TOKENIZER),
    "code of its own": (
        lambda f: edit(f / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["evil.T", None]}),
        NO_TOKENIZER,
    ),
    "template no UTF-8": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), NO_TOKENIZER),
    "template a link to itself": (lambda f: loop(f / "chat_template.jinja"), NO_TEMPLATE),
    "no end": (
        lambda f: (
            edit(f / "tokenizer_config.json", eos_token=None),
            (f / "chat_template.jinja").write_text("{{ messages[-1].content }}"),
        ),
        "neither the chat template nor the tokenizer ends a turn; allowed: an end-of-turn or end-of-sequence token",
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_read(tmp_path: Path, case: str) -> None:
    spoil, expected = TOKENIZERS[case]
    word_tokenizer().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError) as raised:
        ChatEncoder.from_folder(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: {expected}") and "\n" not in str(raised.value)


INDEX = "model.safetensors.index.json"


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


# name: (what is done to the folder, how what is said begins; {} is the folder)
MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "model.path: got '{}'; allowed: a Hugging Face folder with a config.json",
    ),
    "config torn": (lambda f: (f / "config.json").write_text('{"a'), "model.path: got '{}'; config.json is not JSON ("),
    "config no UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff"), "model.path: got '{}'; config.json is not"),
    "config deep": (lambda f: (f / "config.json").write_text("[" * 99999), "model.path: got '{}'; config.json is not"),
    "config a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "model.path: got '{}'; config.json is a JSON list; allowed: an object",
    ),
    "config a link to itself": (lambda f: loop(f / "config.json"), "model.path: got '{}'; allowed: a Hugging Face"),
    "an encoder": (
        lambda f: edit(f / "config.json", architectures=["BertModel"]),
        "model.path: got '{}', which is ['BertModel']; allowed: a Hugging Face folder of a causal language model",
    ),
    "no architecture": (
        lambda f: edit(f / "config.json", architectures=None),
        "model.path: got '{}', which is None; allowed: a Hugging Face folder of a causal language model",
    ),
    "another tokenizer": (
        lambda f: edit(f / "config.json", vocab_size=100),
        "model.path: got '{}', whose tokenizer has 316 entries and whose model has 100; allowed: ",
    ),
    "fewer positions": (
        lambda f: edit(f / "config.json", max_position_embeddings=64),
        "rollout.max_model_len: got 128; allowed: <= 64, which {} reads",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "model.path: got '{}', without model.safetensors or model.safetensors.index.json; allowed: ",
    ),
    "weights torn": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
        "model.path: got '{}'; model.safetensors is torn or missing (",
    ),
    "weights empty": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "model.path: got '{}'; model.safetensors is torn or missing (",
    ),
    "weights of nothing": (
        lambda f: (f / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      "),
        "model.path: got '{}'; model.safetensors holds no weights",
    ),
    "weights with an endless header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
        "model.path: got '{}'; model.safetensors is torn or missing (",
    ),
    "weights a pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "model.path: got '{}'; model.safetensors is torn or missing (",
    ),
    "index of nothing": (
        lambda f: index(f, {}),
        "model.path: got '{}'; model.safetensors.index.json names []; allowed: ",
    ),
    "index a list": (lambda f: index(f, []), "model.path: got '{}'; model.safetensors.index.json names []; allowed: "),
    "index that leads out": (
        lambda f: index(f, {"a": "../x.safetensors"}),
        "model.path: got '{}'; model.safetensors.index.json names ['../x.safetensors']; allowed: .safetensors files",
    ),
    "index of pickles": (
        lambda f: index(f, {"a": "x.bin"}),
        "model.path: got '{}'; model.safetensors.index.json names ['x.bin']; allowed: .safetensors files beside it",
    ),
    "index of a missing file": (
        lambda f: index(f, {"a": "x.safetensors"}),
        "model.path: got '{}'; x.safetensors is torn or missing (",
    ),
    "template that runs away": (
        lambda f: (f / "chat_template.jinja").write_text("{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2),
        "{}: chat template: took longer than 1 s",
    ),
    "tokenizer torn": (lambda f: (f / "tokenizer.json").write_text("{"), "{}: no readable tokenizer ("),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_folder_is_refused_before_anything_starts(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "runs away" in case:
        monkeypatch.setattr(encoding, "TEMPLATE_S", 1.0)  # the same limit, reached in one second and not in ten
    spoil, expected = MODELS[case]
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    spoil(folder)
    assert complaint(capsys, "train", toy_config(tmp_path / "toy", folder)).startswith(expected.format(folder))
    assert not (tmp_path / "toy" / "runs").exists()


@pytest.mark.parametrize("name", ["nowhere", "/dev/null", "x" * 3000, "../../../.."])
def test_a_path_that_is_no_folder(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    said = complaint(capsys, "train", toy_config(tmp_path, tiny), f"model.path={name}")
    assert said == f"model.path: got '{name}'; allowed: a Hugging Face folder with a config.json"
