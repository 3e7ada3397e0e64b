"""The user's own code, named in the configuration as `module:name`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from uniapl.config_errors import ConfigError

_NEXT = "; allowed: module:name, the module below the current folder or installed"


def imported(key: str, name: str, allowed: str) -> Any:
    """What `name` stands for: anything that can be called.

    The current folder is looked into last, and from now on: what lies there by chance under the name of an installed
    package is never run.

    Args:
        key: of the configuration, for the message.
        name: such as `my_rewards:brevity`.
        allowed: what `name` may be, for the message.

    Raises:
        ConfigError: no such form, the module cannot be imported, or has nothing callable of that name.
    """
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        raise ConfigError(f"{key}: got '{name}'; allowed: {allowed}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (Exception, SystemExit) as error:  # a user's module may raise anything, or end the process
        raise ConfigError(f"{key}: got '{name}'; cannot import {module}: {short(error)}{_NEXT}") from None
    if not callable(found):
        what = "has no" if found is None else "is not callable:"
        raise ConfigError(f"{key}: got '{name}'; module {module} {what} {attribute}{_NEXT}")
    return found


def short(error: BaseException) -> str:
    """An exception of the user's code in one short line."""
    try:
        said = " ".join(str(error).split())[:200]
    except Exception:  # a user's exception may fail to describe itself
        said = ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
