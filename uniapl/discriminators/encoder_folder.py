"""The folder of a sentence encoder, found and checked without importing torch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from uniapl.config_errors import ConfigError

_KEY = "objective.adversarial.encoder"


def resolve_encoder(name: str) -> Path:
    """The folder of a sentence encoder, given as a path or as `package:MODULE/FOLDER`.

    The module is located, not imported: it may import libraries that are not installed.

    Raises:
        ConfigError: no such package or folder, or the folder is not a mean-pooling encoder.
    """
    folder = _package_folder(name) if name.startswith("package:") else Path(name)
    for needed in ("config.json", "1_Pooling/config.json"):
        if not (folder / needed).is_file():
            raise ConfigError(f"{_KEY}: got '{name}'; {folder / needed} is missing; allowed: a sentence encoder")
    modes = {
        key for key, on in read_json(folder / "1_Pooling/config.json").items() if key.startswith("pooling_mode") and on
    }
    if modes != {"pooling_mode_mean_tokens"}:
        raise ConfigError(f"{_KEY}: got '{name}', which pools by {sorted(modes)}; allowed: pooling_mode_mean_tokens")
    return folder


def _package_folder(name: str) -> Path:
    module, _, inside = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{_KEY}: got '{name}'; no installed package '{module}'; allowed: a folder, or package:MODULE/FOLDER"
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        ConfigError: it is not JSON.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(f"{_KEY}: {path} is not JSON: {error}; allowed: a whole copy of the encoder") from None
