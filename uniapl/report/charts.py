"""Charts as inline SVG. Colours come from the page's classes `c1` to `c7`, so that dark mode can change them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Literal

import numpy as np
from markupsafe import Markup

from uniapl.analysis import Interval
from uniapl.report.axes import Format, Scale, compact, percent, ticks, value_range

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 26, 36
MAX_POINTS = 300
"""Longer series are drawn as means of equally many steps each."""
FEW = 8
"""Shorter series are not smoothed, and have dots."""


@dataclass(frozen=True)
class Series:
    """A named line. `xs` rise; `ys` has the same length; `colour` is a class of the page.

    smooth: thin, under a thick moving mean; plain: as it is; dots: a dot on each value too.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str = "c1"
    style: Literal["smooth", "plain", "dots"] = "smooth"


@dataclass(frozen=True)
class Figure:
    """A chart with what stands around it on the page. `legend`: (colour class, name) pairs."""

    title: str
    svg: Markup
    legend: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""


def line_chart(
    title: str,
    series: Sequence[Series],
    unit: str,
    show: Format = compact,
    zero: bool = False,
    span: tuple[float, float] | None = None,
) -> Figure | None:
    """Lines over optimizer steps, each over the steps that it has; None when no series has a value.

    `span`: first and last step of the x axis; by default those of the series.
    """
    series = [_thinned(one) for one in series if len(one.xs)]
    if not series:
        return None
    x = _step_scale(span or [x for one in series for x in one.xs])
    y = _value_scale([v for one in series for v in one.ys], zero)
    parts = [_y_axis(y, unit, show), _x_axis(x, "optimizer step", whole=True), _zero_line(y)]
    for one in series:
        parts += _line(one, x, y)
    hover = _hover(x, series, show, "step")
    return Figure(title, _svg(title, series, show, parts, hover), [(s.colour, s.name) for s in series])


def band_chart(
    title: str,
    low: Series,
    middle: Series,
    high: Series,
    told: Sequence[Series],
    unit: str,
    span: tuple[float, float] | None = None,
) -> Figure | None:
    """A line within the band from `low` to `high`, all over the same steps; None when they have no value.

    `told` are not drawn and have no part in the scale: their values are in the hover. `span` as in `line_chart`.
    """
    if not len(middle.xs):
        return None
    low, middle, high, *told = (_thinned(one) for one in (low, middle, high, *told))
    x, y = _step_scale(span or middle.xs), _value_scale([*low.ys, *middle.ys, *high.ys], zero=False)
    outline = _path(high.xs, high.ys, x, y) + _path(low.xs[::-1], low.ys[::-1], x, y).replace("M", "L") + "Z"
    band = f'<path class="band {middle.colour}" d="{outline}"/>'
    parts = [_y_axis(y, unit, compact), _x_axis(x, "optimizer step", whole=True), band, *_line(middle, x, y)]
    rows = [low, middle, high, *told]
    return Figure(title, _svg(title, rows, compact, parts, _hover(x, rows, compact, "step")))


def stacked_chart(title: str, series: Sequence[Series], unit: str, show: Format = compact) -> Figure | None:
    """Layers that add up, one column per step; None when no series has a value. A missing value counts as 0."""
    series = [one for one in series if len(one.xs)]
    if not series:
        return None
    steps = sorted({x for one in series for x in one.xs})
    layers = [_thinned(replace(s, xs=steps, ys=_filled(s, steps))) for s in series]
    steps = list(layers[0].xs)
    tops = np.cumsum([layer.ys for layer in layers], axis=0)
    gap = (steps[1] - steps[0]) if len(steps) > 1 else 1
    x = Scale(steps[0] - gap / 2, steps[-1] + gap / 2, LEFT, WIDTH - RIGHT)
    y = Scale(0, float(tops.max()) or 1.0, HEIGHT - BOTTOM, TOP)
    edges = [steps[0] - gap / 2, *((a + b) / 2 for a, b in itertools.pairwise(steps)), steps[-1] + gap / 2]
    bottoms = np.vstack([np.zeros(len(steps)), tops[:-1]])
    parts = [_y_axis(y, unit, show)]
    for layer, low, high in zip(layers, bottoms, tops, strict=True):
        parts.append(f'<path class="area {layer.colour}" d="{_columns(edges, low, high, x, y)}"/>')
    parts.append(_x_axis(x, "optimizer step", whole=True))
    hover = _hover(x, layers, show, "step")
    return Figure(title, _svg(title, layers, show, parts, hover), [(s.colour, s.name) for s in layers])


def histogram_chart(
    title: str, edges: Sequence[float], layers: Sequence[tuple[str, Sequence[float], str]], x_label: str, top: float
) -> Figure:
    """Outlines of (name, fractions [bins], colour) over shared `edges` [bins + 1]; the y axis ends at `top`."""
    x = Scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    y = Scale(0, top * 1.06 or 1.0, HEIGHT - BOTTOM, TOP)
    parts = [_y_axis(y, "share", percent), _x_axis(x, x_label, whole=False)]
    for _, fractions, colour in layers:
        outline = _columns(edges, [0] * len(fractions), fractions, x, y)
        parts.append(f'<path class="outline {colour}" d="{outline}"/>')
    centres = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    series = [Series(name, centres, fractions, colour) for name, fractions, colour in layers]
    spans = [f"{compact(a)} to {compact(b)} {x_label}" for a, b in itertools.pairwise(edges)]
    hover = _hover(x, series, percent, "", spans)
    return Figure(title, _svg(title, series, percent, parts, hover), [(colour, name) for name, _, colour in layers])


def interval_chart(title: str, rows: Sequence[tuple[str, Interval, str]], named: bool = True) -> Figure:
    """Each (name, interval, colour) as a dot with its 95 % interval on an axis from 0 to 100 %.

    named: with the names, of a few letters, beside the dots; else for a legend.
    """
    height = TOP + 40 * len(rows) + BOTTOM
    x = Scale(0, 1, 62 if named else 16, WIDTH - 16)
    parts = [_x_axis(x, "held-out prompts passed", whole=False, show=percent, height=height, grid=True)]
    for index, (name, interval, colour) in enumerate(rows):
        middle = TOP + 20 + 40 * index
        parts.append(f'<text class="row" x="0" y="{middle + 5}">{escape(name)}</text>' if named else "")
        parts.append(f'<path class="whisker {colour}" d="M{x(interval.low)} {middle}H{x(interval.high)}"/>')
        parts.append(f'<circle class="dot {colour}" cx="{x(interval.value)}" cy="{middle}" r="7"/>')
    text = "; ".join(f"{n} {percent(i.value)}, interval {percent(i.low)} to {percent(i.high)}" for n, i, _ in rows)
    label = escape(f"{title}: {text}", quote=True)
    attributes = f'role="img" tabindex="0" aria-label="{label}"'
    return Figure(title, _element(WIDTH, height, attributes, parts))


def rate_bars(rows: Sequence[tuple[Interval, str]]) -> Markup:
    """Bars from 0 to 100 %, one per (interval, colour), each with its interval: the picture beside a number."""
    x, height = Scale(0, 1, 1, WIDTH - 1), 14 * len(rows) + 2
    parts = [f'<path class="grid" d="M{x(0)} 0V{height}M{x(0.5)} 0V{height}M{x(1)} 0V{height}"/>']
    for index, (interval, colour) in enumerate(rows):
        top = 3 + 14 * index
        parts.append(f'<rect class="bar {colour}" x="1" y="{top}" width="{x(interval.value) - 1:.2f}" height="10"/>')
        parts.append(f'<path class="error" d="M{x(interval.low)} {top + 5}H{x(interval.high)}"/>')
    return _element(WIDTH, height, 'aria-hidden="true"', parts)


def share_bar(rows: Sequence[tuple[float, str]]) -> Markup:
    """One bar cut in proportion to (amount, colour)."""
    total, reached, parts = sum(amount for amount, _ in rows) or 1.0, 0.0, []
    for amount, colour in rows:
        width = 1000 * amount / total
        parts.append(f'<rect class="bar {colour}" x="{reached:.2f}" y="0" width="{width:.2f}" height="28"/>')
        reached += width
    return _element(1000, 28, 'preserveAspectRatio="none" aria-hidden="true"', parts)


def moving_mean(values: Sequence[float]) -> list[float]:
    """The centred mean over about an eighth of the values, over fewer at both ends."""
    half = max(1, len(values) // 16)
    window = np.ones(2 * half + 1)
    sums = np.convolve(values, window)[half : half + len(values)]
    counts = np.convolve(np.ones(len(values)), window)[half : half + len(values)]
    return (sums / counts).tolist()


def _thinned(series: Series) -> Series:
    size = -(-len(series.xs) // MAX_POINTS)
    if size <= 1:
        return series
    cuts = range(0, len(series.xs), size)
    xs, ys = ([float(np.mean(values[k : k + size])) for k in cuts] for values in (series.xs, series.ys))
    return replace(series, xs=xs, ys=ys)


def _filled(series: Series, steps: Sequence[float]) -> list[float]:
    known = dict(zip(series.xs, series.ys, strict=True))
    return [known.get(step, 0.0) for step in steps]


def _step_scale(xs: Sequence[float]) -> Scale:
    low, high = min(xs), max(xs)
    return Scale(low, high, LEFT, WIDTH - RIGHT) if low < high else Scale(low - 0.5, high + 0.5, LEFT, WIDTH - RIGHT)


def _value_scale(values: Sequence[float], zero: bool) -> Scale:
    return Scale(*value_range(values, zero), HEIGHT - BOTTOM, TOP)


def _y_axis(y: Scale, unit: str, show: Format) -> str:
    parts = [f'<text class="unit" x="0" y="11">{escape(unit)}</text>']
    for value in ticks(y.low, y.high, 4):
        parts.append(f'<path class="grid" d="M{LEFT} {y(value)}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y(value) + 4}">{escape(show(value))}</text>')
    return "".join(parts)


def _x_axis(
    x: Scale, label: str, whole: bool, show: Format = compact, height: float = HEIGHT, grid: bool = False
) -> str:
    base, middle = height - BOTTOM, (x.start + x.end) / 2
    parts = [f'<path class="axis" d="M{x.start} {base}H{x.end}"/>']
    for value in ticks(x.low, x.high, 6, whole):
        top = TOP if grid else base
        parts.append(f'<path class="{"grid" if grid else "axis"}" d="M{x(value)} {top}V{base + 4}"/>')
        parts.append(f'<text class="tick mid" x="{x(value)}" y="{base + 16}">{escape(show(value))}</text>')
    parts.append(f'<text class="unit mid" x="{middle}" y="{height - 4}">{escape(label)}</text>')
    return "".join(parts)


def _zero_line(y: Scale) -> str:
    return f'<path class="axis" d="M{LEFT} {y(0)}H{WIDTH - RIGHT}"/>' if y.low < 0 < y.high else ""


def _line(series: Series, x: Scale, y: Scale) -> list[str]:
    raw = _path(series.xs, series.ys, x, y)
    if series.style == "smooth" and len(series.xs) >= FEW:
        top = _path(series.xs, moving_mean(series.ys), x, y)
        return [f'<path class="raw {series.colour}" d="{raw}"/>', f'<path class="line {series.colour}" d="{top}"/>']
    dots = [
        f'<circle class="dot {series.colour}" cx="{x(a)}" cy="{y(b)}" r="3"/>'
        for a, b in zip(series.xs, series.ys, strict=True)
        if series.style == "dots" or len(series.xs) < FEW
    ]
    return [f'<path class="line {series.colour}" d="{raw}"/>', *dots]


def _path(xs: Sequence[float], ys: Sequence[float], x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{x(a)} {y(b)}" for a, b in zip(xs, ys, strict=True))


def _columns(edges: Sequence[float], low: Sequence[float], high: Sequence[float], x: Scale, y: Scale) -> str:
    """The outline of columns that stand side by side on `edges`, from `low` to `high`."""
    there = [f"V{y(top)}H{x(right)}" for top, right in zip(high, edges[1:], strict=True)]
    back = [f"V{y(bottom)}H{x(left)}" for bottom, left in zip(reversed(low), reversed(edges[:-1]), strict=True)]
    return f"M{x(edges[0])} {y(low[0])}" + "".join(there) + "".join(back) + "Z"


def _hover(
    x: Scale, series: Sequence[Series], show: Format, x_name: str, labels: Sequence[str] | None = None
) -> dict[str, object]:
    """What the page's script shows at a place: pixel positions, their labels, one text per series there."""
    xs = sorted({value for one in series for value in one.xs})
    labels = labels or [f"{x_name} {compact(round(value))}" for value in xs]
    known = [dict(zip(one.xs, one.ys, strict=True)) for one in series]
    rows = [
        {"name": one.name, "colour": one.colour, "text": [show(ys[v]) if v in ys else "" for v in xs]}
        for one, ys in zip(series, known, strict=True)
    ]
    return {"px": [x(value) for value in xs], "labels": labels, "rows": rows}


def _svg(title: str, series: Sequence[Series], show: Format, parts: Sequence[str], hover: dict[str, object]) -> Markup:
    told = "; ".join(f"{s.name} from {show(s.ys[0])} to {show(s.ys[-1])}" for s in series)
    label = escape(f"{title}: {told}", quote=True)
    # Within single quotes, so that JSON's many double ones need no escape: that is a third of the page.
    data = escape(json.dumps(hover, separators=(",", ":")), quote=False).replace("'", "&#39;")
    cursor = f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}" visibility="hidden"/>'
    attributes = f'role="img" tabindex="0" aria-label="{label}" data-chart=\'{data}\''
    return _element(WIDTH, HEIGHT, attributes, [*parts, cursor])


def _element(width: float, height: float, attributes: str, parts: Sequence[str]) -> Markup:
    """The SVG element; all text in `attributes` and `parts` has been escaped where it was put in."""
    inside = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {width} {height}" {attributes}>{inside}</svg>')  # noqa: S704
