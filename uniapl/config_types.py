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
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$", title="text, one line and not empty")]
Name = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        title="text of at most 100 letters, digits, '.', '_' and '-', the first a letter or digit",
    ),
]
RedisUrl = Annotated[
    str,
    Field(pattern=r"^(redis|rediss|unix)://\S+$", title="a URL that begins with redis://, rediss:// or unix://"),
]
Address = Annotated[str, Field(pattern=r"^(local|auto|\S+:[0-9]{1,5})$", title="'local', 'auto' or HOST:PORT")]


class Section(BaseModel):
    """A branch of the tree: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)
