"""Numbers -> charts as inline SVG, each with its legend, its values as text for hover and keys, and a table.

Here is what lies where; `charts.html` has the markup. Colours are the page's: a series has the name of a colour, its
"tone". Knows nothing of runs.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


TEMPLATES = Environment(
    loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
_MACROS = TEMPLATES.get_template("charts.html").module
table: Callable[[list[str], list[list[str]]], Markup] = _MACROS.table
"""Header and rows -> a table that scrolls by itself where it is wider than the page."""

# Of the view box: at its natural size on a phone, a little larger on a desktop.
_FRAME = SimpleNamespace(width=360, height=210, left=48, right=350, top=24, bottom=174)
_MAX_POINTS = 240  # a curve of more is averaged: the screen has no more pixels for them
_MAX_TABLE_ROWS = 60


@dataclass(frozen=True)
class Series:
    """A value for each x, where `None` leaves a gap. The tone is "chosen", "rejected", "accent", or "0" to "5"."""

    name: str
    values: Sequence[float | None]
    tone: str = "accent"


@dataclass(frozen=True)
class Axes:
    """
    What a chart shows along its axes; labels name the unit.

    Args:
        percent (`bool`): Whether values are shares, to be shown in per cent.
        x_names (`list[str]`, *optional*): A name for each x where it is no number.
        marks (`dict[float, str]`): Vertical lines with their names.
    """

    title: str
    x_label: str
    y_label: str = ""
    percent: bool = False
    x_names: list[str] | None = None
    marks: dict[float, str] = field(default_factory=dict)


def format_number(value: float | None, percent: bool = False) -> str:
    """A number as every part of the page shows it."""
    if value is None or not math.isfinite(value):
        return "–"
    if percent:
        return f"{100 * value:.1f} %"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def line_chart(axes: Axes, x: Sequence[float], series: list[Series]) -> Markup:
    """Curves over a common x."""
    x, series = _thinned(list(x), series)
    known = [value for one in series for value in one.values if value is not None]
    if not x or not known:
        return Markup("")
    y_ticks = nice_ticks(min(known), max(known))
    low, high = (x[0], x[-1]) if x[-1] > x[0] else (x[0] - 1, x[0] + 1)
    to_x = _scale(low, high, _FRAME.left, _FRAME.right)
    to_y = _scale(y_ticks[0], y_ticks[-1], _FRAME.bottom, _FRAME.top)
    names = axes.x_names or [format_number(at) for at in x]
    if axes.x_names:
        x_ticks = _with_room([(to_x(at), name) for at, name in zip(x, names, strict=True)])
    else:
        x_ticks = [(to_x(at), format_number(at)) for at in nice_ticks(x[0], x[-1], 6) if x[0] <= at <= x[-1]]
    curves = []
    for one in series:
        points = [None if y is None else (to_x(at), to_y(y)) for at, y in zip(x, one.values, strict=True)]
        pens = ["M" if before is None else "L" for before in [None, *points[:-1]]]
        path = "".join(f"{pen}{point[0]} {point[1]}" for pen, point in zip(pens, points, strict=True) if point)
        curves.append((one.tone, path, list(filter(None, points)) if len(x) <= 24 else []))
    marks = [(to_x(at), name) for at, name in axes.marks.items() if low <= at <= high]
    return _figure(axes, series, list(map(to_x, x)), names, x_ticks, y_ticks, to_y, marks=marks, curves=curves)


def bar_chart(axes: Axes, names: list[str], series: list[Series]) -> Markup:
    """A bar for each name, in which the series lie on top of each other."""
    values = np.array([[value or 0 for value in one.values] for one in series], float)  # (series, names)
    if not values.any():
        return Markup("")
    y_ticks = nice_ticks(0, values.sum(axis=0).max())
    to_y = _scale(0, y_ticks[-1], _FRAME.bottom, _FRAME.top)
    room = (_FRAME.right - _FRAME.left) / len(names)
    centres = [round(_FRAME.left + (i + 0.5) * room, 1) for i in range(len(names))]
    width = round(min(0.7 * room, 48), 1)
    tops = np.cumsum(values, axis=0)
    bars = []
    for number, name in np.argwhere(values > 0):
        top, bottom = to_y(tops[number, name]), to_y(tops[number, name] - values[number, name])
        bars.append((series[number].tone, round(centres[name] - width / 2, 1), top, width, round(bottom - top, 1)))
    x_ticks = _with_room(list(zip(centres, names, strict=True)))
    return _figure(axes, series, centres, names, x_ticks, y_ticks, to_y, bars=bars)


def nice_ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Round numbers that enclose `low` and `high`, about so many."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if high else (0.0, 1.0)
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.8 * rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _thinned(x: list[float], series: list[Series]) -> tuple[list[float], list[Series]]:
    size = math.ceil(len(x) / _MAX_POINTS)
    if size <= 1:
        return x, series
    groups = [slice(start, start + size) for start in range(0, len(x), size)]
    means = [Series(s.name, [_mean(s.values[group]) for group in groups], s.tone) for s in series]
    return [x[group][-1] for group in groups], means


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _with_room(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Every so many-th, as the names have room below the chart."""
    room = 8 if max(len(name) for _, name in ticks) <= 5 else 5
    return ticks[:: max(1, math.ceil(len(ticks) / room))]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: round(float(start + (value - low) / (high - low) * (end - start)), 1)


def _tick(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:g} %"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,g}"


def _figure(axes, series, places, names, x_ticks, y_ticks, to_y, marks=(), curves=(), bars=()) -> Markup:
    """A chart with the values at each of its places, which have names along x, to be read one by one and as a table."""
    rows = [[name, *(format_number(one.values[i], axes.percent) for one in series)] for i, name in enumerate(names)]
    readouts = [
        f"{axes.x_label} {name}: " + ", ".join(f"{one.name} {cell}" for one, cell in zip(series, cells, strict=True))
        for name, *cells in rows
    ]
    return _MACROS.figure(
        axes,
        _FRAME,
        series,
        x_ticks,
        [(to_y(value), _tick(value, axes.percent)) for value in y_ticks],
        marks,
        curves,
        bars,
        text=f"{axes.title}. " + "; ".join(dict.fromkeys([readouts[0], readouts[-1]])),
        hover=json.dumps(list(zip(places, readouts, strict=True))),
        header=[axes.x_label, *(one.name for one in series)],
        rows=[*rows[: -1 : math.ceil(len(rows) / _MAX_TABLE_ROWS)], rows[-1]],  # of a long curve, not every step
    )
