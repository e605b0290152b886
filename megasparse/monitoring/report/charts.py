"""Line charts, heat maps and bars as inline SVG. Colours are CSS classes, so that light and dark both read well.

Each figure carries its data as JSON for the hover script of `page`; without scripts the figure still stands.
"""

from __future__ import annotations

import html
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megasparse.monitoring.report.data import Grid, Points

WIDTH = 640
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 10, 34
_PLOT = WIDTH - LEFT - RIGHT
_MOST_POINTS = 500  # twice the pixels that a column of the page has would not show more
_MOST_COLUMNS = 150

# Dark to light, of even lightness steps, readable without colour vision (stops of the "viridis" colour map).
_RAMP = ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59", "#b4de2c", "#fde725"]

Format = Callable[[float], str]


def short(value: float) -> str:
    """Up to four significant figures, with a prefix from 10,000 on and an exponent below 0.001."""
    if not math.isfinite(value):
        return "-"
    size = abs(value)
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if prefix == 'k' else limit):.3g}{prefix}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.3g} %" if math.isfinite(value) else "-"


def byte_size(value: float) -> str:
    """1536 -> "1.5 KiB"."""
    if not math.isfinite(value):
        return "-"
    for limit, prefix in ((2**40, "Ti"), (2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
        if abs(value) >= limit:
            return f"{value / limit:.4g} {prefix}B"
    return f"{value:.0f} B"


@dataclass
class Series:
    name: str
    points: Points
    colour: int
    """Index into the page's series colours."""
    dots: bool = False
    """Mark every point, where they are few."""
    dashed: bool = False


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    zero: bool = False,
    unit: Format = short,
    note: str = "",
    marks: Sequence[int] = (),
    x_name: str = "step",
) -> str:
    """A figure of values over steps, or "" where no series has a finite point.

    Args:
        log: logarithmic values where all are positive. zero: the axis starts at 0.
        marks: steps of vertical lines (restarts).
        x_name: what the points are over, where not steps.
    """
    drawn = [Series(s.name, _thin(s.points), s.colour, s.dots, s.dashed) for s in series]
    drawn = [s for s in drawn if any(math.isfinite(y) for _, y in s.points)]
    if not drawn:
        return ""
    ys = [y for s in drawn for _, y in s.points if math.isfinite(y)]
    xs = [x for s in drawn for x, _ in s.points]
    log = log and min(ys) > 0
    low, high = (min(0.0, min(ys)) if zero else min(ys)), max(ys)
    if high - low < 1e-12 * max(abs(high), 1e-12):
        pad = abs(high) * 0.1 or 1.0
        low, high = (low if zero and low == 0 else low - pad), high + pad
    elif log:
        low, high = low * (low / high) ** 0.04, high * (high / low) ** 0.04
    else:
        high += 0.04 * (high - low)
        low -= 0.0 if zero and low == 0 else 0.04 * (high - low)
    height = 250
    x_of = _scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, LEFT + _PLOT, False)
    y_of = _scale(low, high, height - BOTTOM, TOP, log)
    body = []
    for tick in _log_ticks(low, high) if log else _ticks(low, high, 5, unit is byte_size):
        y = y_of(tick)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{esc(unit(tick))}</text>')
    body += _step_axis(min(xs), max(xs), x_of, height - BOTTOM, x_name)
    for mark in marks:
        if min(xs) <= mark <= max(xs):
            x = x_of(mark)
            body.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
    for s in drawn:
        style = f"line c{s.colour % 6}" + (" dashed" if s.dashed else "")
        body.append(f'<path class="{style}" d="{_path(s.points, x_of, y_of)}"/>')
        finite = sum(math.isfinite(y) for _, y in s.points)
        if finite == 1 or (s.dots and finite <= 60):
            body += [
                f'<circle class="dot c{s.colour % 6}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.6"/>'
                for x, y in s.points
                if math.isfinite(y)
            ]
    data = {
        "kind": "line",
        "over": x_name,
        "x": [min(xs), max(xs)],
        "series": [
            {"name": s.name, "c": s.colour % 6, "p": [[x, unit(y), round(y_of(y), 1)] for x, y in s.points if y == y]}
            for s in drawn
        ],
    }
    return _figure(title, body, height, data, _legend(drawn) if len(drawn) > 1 else "", note)


def heat_map(
    title: str, grid: Grid, *, low: float, high: float, log: bool = False, unit: Format = short, note: str = ""
) -> str:
    """Layers (down) over steps (across), coloured from `low` (dark) to `high` (light); "" where nothing is logged."""
    if not grid.steps or not grid.finite():
        return ""
    steps, values = _bin_columns(grid)
    log = log and low > 0 and high > low
    row = max(6.0, min(22.0, 240 / len(grid.layers)))
    bottom = TOP + row * len(grid.layers)
    height = round(bottom + BOTTOM)
    cell = _PLOT / len(steps)
    share = _scale(low, high, 0.0, 1.0, log) if high > low else (lambda _value: 0.5)
    body = []
    for index, line in enumerate(values):
        for colour, (start, length) in _runs([None if v != v else round(share(v) * 63) for v in line]):
            if colour is None:
                continue
            # Half a pixel of overlap hides the hairlines that anti-aliasing leaves between neighbours.
            x, w = LEFT + start * cell, min(length * cell + 0.5, LEFT + _PLOT - (LEFT + start * cell))
            y = TOP + index * row
            body.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{row + 0.4:.1f}" fill="{ramp(colour / 63)}"/>'
            )
    every = max(1, math.ceil(13 / row), math.ceil(len(grid.layers) / 20))
    for index, layer in enumerate(grid.layers):
        if index % every == 0:
            y = TOP + (index + 0.5) * row + 3.5
            body.append(f'<text class="tick" x="{LEFT - 7}" y="{y:.1f}" text-anchor="end">{layer}</text>')
    middle = (TOP + bottom) / 2
    body.append(
        f'<text class="tick" transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">layer</text>'
    )
    last = steps[-1] if len(steps) > 1 else steps[0] + 1
    x_of = _scale(steps[0], last, LEFT + cell / 2, LEFT + _PLOT - cell / 2, False)
    body += _step_axis(steps[0], steps[-1], x_of, bottom)
    stops = " ".join(f'<stop offset="{i / 9:.3f}" stop-color="{colour}"/>' for i, colour in enumerate(_RAMP))
    key = f"ramp{zlib.crc32(title.encode())}"
    middle_value = math.sqrt(low * high) if log else (low + high) / 2
    legend = (
        f'<div class="legend scale"><span>{esc(unit(low))}</span><svg viewBox="0 0 160 10" width="160" height="10" '
        f'aria-hidden="true"><defs><linearGradient id="{key}">{stops}</linearGradient></defs>'
        f'<rect width="160" height="10" rx="2" fill="url(#{key})"/></svg><span>{esc(unit(high))}</span>'
        f'<span class="quiet">middle {esc(unit(middle_value))}{", logarithmic" if log else ""}</span></div>'
    )
    data = {
        "kind": "heat",
        "steps": [round(step) for step in steps],
        "layers": grid.layers,
        "row": row,
        "v": [[unit(v) for v in line] for line in values],
    }
    return _figure(title, body, height, data, legend, note)


def bar_chart(
    title: str, labels: Sequence[str], bars: Sequence[tuple[str, Sequence[float]]], *, unit: Format, note: str = ""
) -> str:
    """Groups of bars from zero, one group a label; "" where nothing is finite."""
    finite = [value for _, values in bars for value in values if math.isfinite(value)]
    if not finite:
        return ""
    high = max(finite) * 1.05 or 1.0
    height = 250
    y_of = _scale(0.0, high, height - BOTTOM, TOP, False)
    group = _PLOT / len(labels)
    width = min(26.0, group * 0.76 / len(bars))
    body = []
    for tick in _ticks(0.0, high, 5, unit is byte_size):
        y = y_of(tick)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{esc(unit(tick))}</text>')
    every = max(1, math.ceil(len(labels) / 20))
    for index, label in enumerate(labels):
        centre = LEFT + (index + 0.5) * group
        for number, (name, values) in enumerate(bars):
            if not math.isfinite(values[index]):
                continue
            x, y = centre + (number - len(bars) / 2) * width, y_of(values[index])
            tip = esc(f"layer {label}, {name}: {unit(values[index])}")
            body.append(
                f'<rect class="bar c{number % 6}" x="{x:.1f}" y="{y:.1f}" width="{max(1.0, width - 2):.1f}" '
                f'height="{height - BOTTOM - y:.1f}"><title>{tip}</title></rect>'
            )
        if index % every == 0:
            y = height - BOTTOM + 15
            body.append(f'<text class="tick" x="{centre:.1f}" y="{y}" text-anchor="middle">{label}</text>')
    body.append(f'<text class="tick" x="{LEFT + _PLOT / 2}" y="{height - 4}" text-anchor="middle">layer</text>')
    legend = _legend([Series(name, [], number) for number, (name, _) in enumerate(bars)]) if len(bars) > 1 else ""
    return _figure(title, body, height, None, legend, note)


def ramp(share: float) -> str:
    """Colour at `share` (0 to 1, clipped) of the heat map's scale."""
    position = min(1.0, max(0.0, share)) * (len(_RAMP) - 1)
    index = min(int(position), len(_RAMP) - 2)
    first, second = _RAMP[index], _RAMP[index + 1]
    mixed = [
        round(int(first[i : i + 2], 16) + (position - index) * (int(second[i : i + 2], 16) - int(first[i : i + 2], 16)))
        for i in (1, 3, 5)
    ]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def esc(text: str) -> str:
    return html.escape(text, quote=True)


def _figure(title: str, body: list[str], height: int, data: object, legend: str, note: str) -> str:
    encoded = esc(json.dumps(data, separators=(",", ":"))) if data else ""
    attribute = f' data-chart="{encoded}"' if data else ""
    caption = f"<p>{esc(note)}</p>" if note else ""
    return (
        f"<figure{attribute}><figcaption><h3>{esc(title)}</h3>{caption}</figcaption>{legend}"
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{esc(title)}">'
        + "".join(body)
        + "</svg></figure>\n"
    )


def _legend(series: Sequence[Series]) -> str:
    items = "".join(
        f'<span><i class="key c{s.colour % 6}{" dashed" if s.dashed else ""}"></i>{esc(s.name)}</span>' for s in series
    )
    return f'<div class="legend">{items}</div>'


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Callable[[float], float]:
    if log:
        low, high = math.log(low), math.log(high)
        return lambda value: start + (math.log(value) - low) / (high - low) * (end - start)
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float, about: int, binary: bool = False) -> list[float]:
    """Round numbers within [low, high]; `binary`: round in KiB, MiB, ..."""
    if binary and high > 0:
        size = 1024.0 ** math.floor(math.log(high, 1024))
        return [tick * size for tick in _ticks(low / size, high / size, about)]
    rough = (high - low) / about
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(first + i) * step if abs((first + i) * step) > 1e-12 * step else 0.0 for i in range(count)]


def _log_ticks(low: float, high: float) -> list[float]:
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 2.5, 3, 4, 5, 7)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(ticks) >= 4:
            return ticks
    return _ticks(low, high, 5)


def _step_axis(low: float, high: float, x_of: Callable[[float], float], y: float, name: str = "step") -> list[str]:
    ticks = [tick for tick in _ticks(low, high, 6) if tick == round(tick)] if high > low else [low]
    axis = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>']
    axis += [
        f'<text class="tick" x="{x_of(tick):.1f}" y="{y + 15:.1f}" text-anchor="middle">{short(tick)}</text>'
        for tick in ticks
    ]
    axis.append(f'<text class="tick" x="{LEFT + _PLOT / 2}" y="{y + 30:.1f}" text-anchor="middle">{esc(name)}</text>')
    return axis


def _path(points: Points, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    parts, pen_down = [], False
    for x, y in points:
        if math.isfinite(y):
            parts.append(f"{'L' if pen_down else 'M'}{x_of(x):.1f} {y_of(y):.1f}")
        pen_down = math.isfinite(y)
    return "".join(parts)


def _thin(points: Points) -> Points:
    """At most about `_MOST_POINTS`: of each stretch the lowest and the highest stay, so that spikes do."""
    if len(points) <= _MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    result: Points = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if math.isfinite(point[1])]
        if not finite:
            result.append(stretch[0])
            continue
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        result += sorted(ends)
    return result


def _bin_columns(grid: Grid) -> tuple[list[float], list[list[float]]]:
    """Mean over neighbouring records where there are more than a page can show."""
    size = math.ceil(len(grid.steps) / _MOST_COLUMNS)
    if size == 1:
        return grid.steps, grid.values
    starts = range(0, len(grid.steps), size)

    def mean(values: list[float]) -> float:
        finite = [value for value in values if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else math.nan

    return (
        [mean(grid.steps[start : start + size]) for start in starts],
        [[mean(row[start : start + size]) for start in starts] for row in grid.values],
    )


def _runs(row: list[int | None]) -> list[tuple[int | None, tuple[int, int]]]:
    """Neighbours of the same colour joined: (colour, (first column, columns))."""
    result: list[tuple[int | None, tuple[int, int]]] = []
    for column, value in enumerate(row):
        if result and result[-1][0] == value:
            _, (start, length) = result[-1]
            result[-1] = (value, (start, length + 1))
        else:
            result.append((value, (column, 1)))
    return result
