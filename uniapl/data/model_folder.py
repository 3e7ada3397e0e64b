"""What must be in the policy's folder, found out without loading weights and without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from uniapl.config import Config
from uniapl.config_errors import ConfigError

_KEY = "model.path"
_ALLOWED = "a Hugging Face folder of a causal language model"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_model(config: Config, tokens: int) -> None:
    """Check the policy's folder: its configuration, its weights' files, its size.

    Args:
        config: of the run.
        tokens: entries of the tokenizer.

    Raises:
        ConfigError: something is missing, torn, or does not go with the configuration.
    """
    folder = config.model.path
    model = read_model_config(_KEY, folder)
    kinds = model.get("architectures")
    if not isinstance(kinds, list) or not any(str(kind).endswith("ForCausalLM") for kind in kinds):
        raise _wrong(folder, f"which is {kinds}")
    vocabulary, positions = size_of(model, "vocab_size"), size_of(model, "max_position_embeddings")
    if vocabulary is not None and tokens > vocabulary:
        raise _wrong(folder, f"whose tokenizer has {tokens} entries and whose model has {vocabulary}")
    needed = config.rollout.max_model_len
    if config.needs_engine and positions is not None and needed > positions and not model.get("rope_scaling"):
        raise ConfigError(f"rollout.max_model_len: got {needed}; allowed: <= {positions}, which {folder} reads")
    for name in _weight_files(folder):
        _check_weights(folder, name)


def read_model_config(key: str, folder: str) -> dict[str, Any]:
    """The config.json of a Hugging Face folder.

    Raises:
        ConfigError: there is none, or it is not a JSON object; `key` is of the configuration, for the message.
    """
    path = Path(folder) / "config.json"
    if not os.path.isfile(path):
        raise ConfigError(f"{key}: got '{folder}'; allowed: a Hugging Face folder with a config.json")
    return _read_object(key, folder, path)


def size_of(model: dict[str, Any], name: str) -> int | None:
    """A size in a config.json, which some architectures keep one level down; None where there is none."""
    inner = model.get("text_config")
    value = model.get(name, inner.get(name) if isinstance(inner, dict) else None)
    return value if isinstance(value, int) else None


def _read_object(key: str, folder: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{key}: got '{folder}'; {path.name} is not JSON ({_short(error)}); allowed: a whole copy of the model"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{key}: got '{folder}'; {path.name} is a JSON {type(found).__name__}; allowed: an object")
    return found


def _weight_files(folder: str) -> list[str]:
    if os.path.isfile(Path(folder) / WEIGHTS):
        return [WEIGHTS]
    if not os.path.isfile(Path(folder) / INDEX):
        raise ConfigError(f"{_KEY}: got '{folder}', without {WEIGHTS} or {INDEX}; allowed: {_ALLOWED}")
    places = _read_object(_KEY, folder, Path(folder) / INDEX).get("weight_map")
    names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    if not names or any(name != os.path.basename(name) or not name.endswith(".safetensors") for name in names):
        raise ConfigError(f"{_KEY}: got '{folder}'; {INDEX} names {names!r:.80}; allowed: .safetensors files beside it")
    return names


def _check_weights(folder: str, name: str) -> None:
    """Header and length: a file that was cut off while it was copied is the usual damage."""
    try:
        with safe_open(str(Path(folder) / name), framework="numpy") as weights:
            empty = not weights.keys()
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{_KEY}: got '{folder}'; {name} is torn or missing ({_short(error)}); allowed: a whole copy of the model"
        ) from None
    if empty:
        raise ConfigError(f"{_KEY}: got '{folder}'; {name} holds no weights; allowed: {_ALLOWED}")


def _wrong(folder: str, what: str) -> ConfigError:
    return ConfigError(f"{_KEY}: got '{folder}', {what}; allowed: {_ALLOWED}")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
