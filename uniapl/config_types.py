"""Kinds of values in the configuration; see `uniapl.config`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["float32", "bfloat16"]
# A title says in words what is allowed, where the pattern does not say it well.
# Without control characters, separators of lines, and marks that turn the direction of writing.
_CHARACTER = r"[^\x00-\x1f\x7f-\x9f\u{2028}\u{2029}\u{200e}\u{200f}\u{202a}-\u{202e}\u{2066}-\u{2069}]"
Text = Annotated[
    str,
    Field(pattern=rf"^{_CHARACTER}{{1,4095}}$", title="one line of 1 to 4095 characters, without control characters"),
]
Name = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        title="text of at most 100 letters, digits, '.', '_' and '-', the first a letter or digit",
    ),
]
RedisUrl = Annotated[
    str,
    Field(pattern=r"^(redis|rediss|unix)://[!-~]+$", title="a URL that begins with redis://, rediss:// or unix://"),
]
REDIS_PASSWORD = "UNIAPL_REDIS_PASSWORD"  # noqa: S105 (a name)
"""The environment variable that Redis's password comes from: the configuration is written into the run's folder."""
REWARD_TOKEN = "UNIAPL_REWARD_TOKEN"  # noqa: S105 (a name)
"""The one that the bearer token of rewards over HTTP comes from."""
_PORT = r"([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
Address = Annotated[
    str, Field(pattern=rf"^(local|auto|[A-Za-z0-9._:\[\]-]+:{_PORT})$", title="'local', 'auto' or HOST:PORT")
]


class Section(BaseModel):
    """A branch of the tree: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)
