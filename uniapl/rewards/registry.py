"""Reward functions by name: the built-in ones, the user's `module:function`, and servers by their address."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from uniapl.config import RewardFunction
from uniapl.config_errors import ConfigError
from uniapl.own_code import imported, short
from uniapl.rewards.answers import exact_match, math
from uniapl.rewards.http import SCHEMES, HttpReward
from uniapl.rewards.instructions import ifbench, ifeval, registry
from uniapl.rewards.types import RewardCallable

BUILT_IN: dict[str, RewardCallable] = {"ifeval": ifeval, "ifbench": ifbench, "exact_match": exact_match, "math": math}
_WARM_UPS: dict[str, Callable[[], object]] = {
    "ifeval": lambda: registry("ifeval"),
    "ifbench": lambda: registry("ifbench"),
}


@dataclass(frozen=True)
class Reward:
    """A reward function with what the configuration says about it."""

    name: str
    weight: float
    version: str
    function: RewardCallable

    def warm_up(self) -> None:
        """Load what the first call would otherwise wait for."""
        _WARM_UPS.get(self.name, lambda: None)()


def resolve(functions: Sequence[RewardFunction], timeout_s: float = 60.0) -> list[Reward]:
    """The configured reward functions, imported.

    Args:
        functions: of the configuration.
        timeout_s: seconds of one call.

    Raises:
        ConfigError: a name is unknown or stands twice, or a user's function cannot be imported,
            is not callable or is asynchronous.
    """
    names = [entry.name for entry in functions]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(f"reward.functions.{index}.name: got '{name}' a second time; allowed: each name once")
    keys = [f"reward.functions.{index}.name" for index in range(len(names))]
    return [
        Reward(entry.name, entry.weight, entry.version, _function(entry.name, key, timeout_s))
        for entry, key in zip(functions, keys, strict=True)
    ]


def require_rewards(functions: Sequence[RewardFunction], timeout_s: float = 60.0) -> None:
    """Check that the reward functions can be resolved, and that servers among them listen.

    Raises:
        ConfigError: as `resolve`, or nobody listens at an address.
    """
    for reward in resolve(functions, timeout_s):
        if isinstance(reward.function, HttpReward):
            reward.function.require()


def _function(name: str, key: str, timeout_s: float) -> RewardCallable:
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.startswith(SCHEMES):
        return HttpReward(name, key, timeout_s)
    function: RewardCallable = imported(key, name, f"{', '.join(BUILT_IN)}, module:function, or http(s)://HOST:PORT")
    for kind, is_kind in _NOT_PLAIN.items():
        if is_kind(function):
            raise ConfigError(f"{key}: got '{name}', {kind}; allowed: a plain function")
    try:
        inspect.signature(function).bind(None, "")
    except TypeError as error:
        raise ConfigError(f"{key}: got '{name}', {short(error)}; allowed: a function of (prompt, response)") from None
    except ValueError:
        return function  # one written in C, which does not tell its parameters
    return function


_NOT_PLAIN: dict[str, Callable[[object], bool]] = {
    "an async function": inspect.iscoroutinefunction,
    "an async generator": inspect.isasyncgenfunction,
    "a generator": inspect.isgeneratorfunction,
}
