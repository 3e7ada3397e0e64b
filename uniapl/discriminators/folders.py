"""What a Hugging Face folder holds, found out without loading weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uniapl.config_errors import ConfigError


def read_folder(key: str, name: str, allowed: str) -> tuple[Any, Any]:
    """The configuration and the tokenizer of a folder; code in it is never run.

    Args:
        key: of the configuration, for the message.
        name: of the folder.
        allowed: what it should be, for the message.

    Raises:
        ConfigError: one of them is missing, or nothing that transformers knows.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = Path(name) / "config.json"
    if not config.is_file():
        raise ConfigError(f"{key}: got '{name}'; {config} is missing; allowed: {allowed}")
    try:
        model = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{key}: got '{name}'; {' '.join(str(error).split())[:200]}; allowed: {allowed}") from None
    if not tokenizer.encode("text", add_special_tokens=False):  # transformers makes an empty one where there is none
        raise ConfigError(f"{key}: got '{name}'; it holds no tokenizer; allowed: {allowed}")
    return model, tokenizer
