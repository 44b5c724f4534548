"""Numbers -> charts as inline SVG, each with its legend, its values as text for hover and keys, and a table.

Colours are the page's: a series has the name of a colour, its "tone". Knows nothing of runs.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup


WIDTH, HEIGHT = 360, 210  # of the view box: at its natural size on a phone, a little larger on a desktop
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 24, 36
_MAX_POINTS = 240  # a curve of more is averaged: the screen has no more pixels for them
_MAX_TABLE_ROWS = 60


@dataclass(frozen=True)
class Series:
    """
    Args:
        name (`str`): As in the legend.
        values (`list[float | None]`): One for each x; `None` leaves a gap.
        tone (`str`): "chosen", "rejected", "accent", or a number as text for the further ones, "0" to "5".
    """

    name: str
    values: Sequence[float | None]
    tone: str = "accent"


@dataclass(frozen=True)
class Axes:
    """
    What a chart shows along its axes.

    Args:
        title (`str`): Of the chart.
        x_label, y_label (`str`): With the unit.
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
    names = axes.x_names or [format_number(at) for at in x]
    if axes.x_names:
        x_ticks = [(at, names[at]) for at in range(len(x))][:: _label_step(names)]
    else:
        x_ticks = [(at, format_number(at)) for at in nice_ticks(x[0], x[-1], 6) if x[0] <= at <= x[-1]]
    low, high = (x[0], x[-1]) if x[-1] > x[0] else (x[0] - 1, x[0] + 1)
    to_x, to_y = _scale(low, high, _LEFT, WIDTH - _RIGHT), _scale(y_ticks[0], y_ticks[-1], HEIGHT - _BOTTOM, _TOP)
    body = _axes(axes, [(to_x(at), name) for at, name in x_ticks], y_ticks, to_y)
    for at, name in axes.marks.items():
        if low <= at <= high:
            line = '<line class="mark" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"><title>{name}</title></line>'
            body += Markup(line).format(x=_r(to_x(at)), top=_TOP, bottom=HEIGHT - _BOTTOM, name=name)
    for one in series:
        body += _curve(one, x, to_x, to_y)
    return _figure(axes, body, series, [to_x(at) for at in x], names)


def bar_chart(axes: Axes, names: list[str], series: list[Series], stacked: bool = False) -> Markup:
    """Bars, one group for each name: beside each other, or on top of each other."""
    values = np.array([[value or 0 for value in one.values] for one in series], float)  # (series, names)
    if not values.any():
        return Markup("")
    y_ticks = nice_ticks(0, (values.sum(axis=0) if stacked else values).max())
    to_y = _scale(0, y_ticks[-1], HEIGHT - _BOTTOM, _TOP)
    group = (WIDTH - _LEFT - _RIGHT) / len(names)
    centres = [_LEFT + (i + 0.5) * group for i in range(len(names))]
    width = min(0.7 * group, 48) if stacked else 0.86 * group / len(series)
    body = _axes(axes, list(zip(centres, names, strict=True))[:: _label_step(names)], y_ticks, to_y)
    floors = np.zeros(len(names))
    for number, (one, heights) in enumerate(zip(series, values, strict=True)):
        shift = -0.5 if stacked else number - len(series) / 2
        for centre, floor, height in zip(centres, floors, heights, strict=True):
            if height:
                top, bottom = to_y(floor + height), to_y(floor)
                body += Markup('<rect class="fill-{}" x="{}" y="{}" width="{}" height="{}"/>').format(
                    one.tone, _r(centre + shift * width), _r(top), _r(width), _r(bottom - top)
                )
        if stacked:
            floors += heights
    return _figure(axes, body, series, centres, names)


def table(header: list[str], rows: list[list[str]]) -> Markup:
    """A table that scrolls by itself where it is wider than the page."""
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in header)
    body = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            row[0], Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row[1:])
        )
        for row in rows
    )
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table><thead><tr>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>"
    ).format(head, body)


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


def _label_step(names: list[str]) -> int:
    """Every how many-th name has room below the chart."""
    room = 8 if max(map(len, names)) <= 5 else 5
    return max(1, math.ceil(len(names) / room))


def _scale(low: float, high: float, start: float, end: float):
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _r(value: float) -> str:
    return f"{value:.1f}"


def _axes(axes: Axes, x_ticks: list[tuple[float, str]], y_ticks: list[float], to_y) -> Markup:
    body = Markup("")
    for value in y_ticks:
        y, name = to_y(value), f"{100 * value:g} %" if axes.percent else _tick(value)
        body += Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(_LEFT, WIDTH - _RIGHT, y=_r(y))
        body += Markup('<text class="y" x="{}" y="{}">{}</text>').format(_LEFT - 6, _r(y + 4), name)
    for x, name in x_ticks:
        body += Markup('<text class="x" x="{}" y="{}">{}</text>').format(_r(x), HEIGHT - _BOTTOM + 15, name)
    body += Markup('<text class="x" x="{}" y="{}">{}</text>').format((WIDTH + _LEFT) / 2, HEIGHT - 5, axes.x_label)
    return body + Markup('<text class="unit" x="2" y="9">{}</text>').format(axes.y_label)


def _tick(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,g}"


def _curve(series: Series, x: list[float], to_x, to_y) -> Markup:
    path, dots, pen = "", Markup(""), "M"
    for at, value in zip(x, series.values, strict=True):
        if value is None:  # a gap
            pen = "M"
            continue
        path += f"{pen}{_r(to_x(at))} {_r(to_y(value))}"
        dots += Markup('<circle class="fill-{}" cx="{}" cy="{}" r="3"/>').format(
            series.tone, _r(to_x(at)), _r(to_y(value))
        )
        pen = "L"
    return Markup('<path class="line-{}" d="{}"/>').format(series.tone, path) + (dots if len(x) <= 24 else "")


def _figure(axes: Axes, body: Markup, series: list[Series], places: list[float], names: list[str]) -> Markup:
    """A chart with the values at each of its places, which have names along x, to be read one by one and as a table."""
    rows = [[format_number(one.values[i], axes.percent) for one in series] for i in range(len(names))]
    readouts = [
        f"{axes.x_label} {name}: " + ", ".join(f"{one.name} {cell}" for one, cell in zip(series, row, strict=True))
        for name, row in zip(names, rows, strict=True)
    ]
    legend = Markup("")
    if len(series) > 1:
        items = (Markup('<li class="key-{}">{}</li>').format(one.tone, one.name) for one in series)
        legend = Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))
    cells = [[name, *row] for name, row in zip(names, rows, strict=True)]
    step = math.ceil(len(cells) / _MAX_TABLE_ROWS)  # not every step of a long curve, but the last one
    return Markup(
        '<figure class="chart"><figcaption>{title}</figcaption>{legend}'
        '<svg viewBox="0 0 {width} {height}" role="img" tabindex="0" aria-label="{text}" data-hover="{hover}">{body}'
        '<line class="cursor" x1="0" x2="0" y1="{top}" y2="{bottom}"/></svg>'
        '<p class="readout" aria-live="polite"></p>'
        "<details><summary>Table</summary>{table}</details></figure>"
    ).format(
        title=axes.title,
        legend=legend,
        width=WIDTH,
        height=HEIGHT,
        text=f"{axes.title}. " + "; ".join(dict.fromkeys([readouts[0], readouts[-1]])),
        hover=json.dumps([[_r(place), readout] for place, readout in zip(places, readouts, strict=True)]),
        body=body,
        top=_TOP,
        bottom=HEIGHT - _BOTTOM,
        table=table([axes.x_label, *(one.name for one in series)], [*cells[:-1:step], cells[-1]]),
    )
