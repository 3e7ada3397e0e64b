"""Ticks, scales and number formats of the report's charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Format = Callable[[float], str]


def compact(value: float) -> str:
    """Three significant digits: `0.312`, `1,234`, `56.7k`, `1.2e-5`."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 9.995e-5:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    elif size >= 999_500:
        text = f"{value / 1e6:,.3g}M" if size < 9.995e8 else f"{value / 1e9:,.4g}B"
    elif size >= 9_999.5:
        text = f"{value / 1e3:.3g}k"
    elif size >= 999.5:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "−", 1) if value < 0 else text


def percent(value: float) -> str:
    """A fraction as `31 %`, below ten percent with a decimal where it has one."""
    text = f"{100 * value:.1f}".removesuffix(".0") if abs(value) < 0.1 else f"{100 * value:.0f}"
    return f"{text} %".replace("-", "−")


def points(value: float) -> str:
    """A difference of two fractions as `+27`, in percentage points."""
    return f"{100 * value:+.0f}".replace("-", "−").replace("−0", "0").replace("+0", "0")


def clock(seconds: float) -> str:
    """Such as `8.3 s`, `2 min 5 s` or `1 h 2 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def ticks(low: float, high: float, target: int = 5, whole: bool = False) -> list[float]:
    """Round values within [low, high], about `target` of them, in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, target)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next((m for m, limit in ((1, 1.5), (2, 3.5), (5, 7.5)) if raw < limit * power), 10)
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


@dataclass(frozen=True)
class Scale:
    """Values [low, high] laid out on pixels [start, end], to a tenth of one."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 1)


def value_range(values: Sequence[float], zero: bool) -> tuple[float, float]:
    """The values' range with some air around them; it begins (or ends) at 0 when `zero` is set."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if low == high:
        pad = abs(low) * 0.1 or 0.5
        return (low, high + 2 * pad) if zero else (low - pad, high + pad)
    pad = (high - low) * 0.06
    return (low if zero and low == 0 else low - pad), (high if zero and high == 0 else high + pad)
