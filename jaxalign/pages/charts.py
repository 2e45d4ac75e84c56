"""The geometry of small line charts: data in, ready coordinates out. A template draws them as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 24
_SUFFIXES = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))  # from, unit, sign

Point = tuple[float, float | None]  # (x, y); y None is a gap in the line
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Series:
    """One line: `kind` is its CSS class, `points` are in the order of x. Dots mark every point.

    marks  a text beside each point; bars, spans: the interval of each point's y, of its x, or None
    """

    name: str
    kind: str
    points: Sequence[Point]
    dots: bool = False
    marks: Sequence[str] = ()
    bars: Sequence[Interval] = ()
    spans: Sequence[Interval] = ()


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place in SVG units and its text."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A series in SVG units: `path` for <path d>, `dots` (x, y, text), `last` its last value in words,
    `marks` (x, y, text, text-anchor), `bars` (x1, y1, x2, y2) of intervals."""

    name: str
    kind: str
    path: str
    dots: list[tuple[float, float, str]]
    last: str
    marks: list[tuple[float, float, str, str]] = field(default_factory=list)
    bars: list[tuple[float, float, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """Everything a template needs to draw one chart; `lines` is empty when nothing was recorded."""

    title: str
    x_label: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    zero: bool = False,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Chart:
    """A chart of `series` over common axes; `zero` makes the y axis start at 0. Empty series are left out.
    `size` is width and height in SVG units."""
    drawn = [s for s in series if any(_is_number(y) for _, y in s.points)]
    if not drawn:
        return Chart(title, x_label, [], [], [])
    xs = [x for s in drawn for x, y in s.points if _is_number(y)] + _ends(s.spans for s in drawn)
    ys = [y for s in drawn for _, y in s.points if y is not None and _is_number(y)]
    ys += _ends(s.bars for s in drawn)
    x_low = min(0.0, *xs)  # steps count from 0, whichever was recorded first
    x_marks = [mark for mark in ticks(x_low, max(xs), 5) if x_low <= mark <= max(xs)]
    y_marks = ticks(0.0 if zero else min(ys), max(ys), 4)
    right, bottom = size[0] - RIGHT, size[1] - BOTTOM
    x_scale = _Scale(x_low, max(xs), LEFT, right)
    y_scale = _Scale(y_marks[0], y_marks[-1], bottom, TOP)
    return Chart(
        title,
        x_label,
        [_line(s, x_scale, y_scale) for s in drawn],
        [Tick(x_scale(mark), short(mark)) for mark in x_marks],
        [Tick(y_scale(mark), short(mark)) for mark in y_marks],
        *size,
        right=right,
        bottom=bottom,
    )


def _ends(intervals: Iterable[Sequence[Interval]]) -> list[float]:
    return [end for each in intervals for interval in each if interval for end in interval]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values (1, 2, 2.5 or 5 times a power of ten) that enclose `low` to `high`."""
    if low == high:
        low, high = (0.0, 2 * high) if high > 0 else (low - 1.0, high + 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float, digits: int = 4) -> str:
    """A number in few characters: `12.5k`, `320`, `0.25`, `2e-4`, with at most `digits` digits that count."""
    size = abs(value)
    for least, unit, suffix in _SUFFIXES:
        if size >= least:
            return f"{value / unit:.{digits}g}{suffix}"
    if size and size < 1e-2:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}g}"


def _line(series: Series, x_scale: _Scale, y_scale: _Scale) -> Line:
    path, dots, pen_up, last = [], [], True, ""
    for x, y in series.points:
        if y is None or not math.isfinite(y):
            pen_up = True
            continue
        px, py = round(x_scale(x), 1), round(y_scale(y), 1)
        path.append(f"{'M' if pen_up else 'L'}{px} {py}")
        dots.append((px, py, f"{series.name} {short(y)} at {short(x)}"))
        pen_up, last = False, short(y, 3)
    shown = dots if series.dots or len(dots) == 1 else []
    marks, bars = _marks(series, x_scale, y_scale), _bars(series, x_scale, y_scale)
    return Line(series.name, series.kind, " ".join(path), shown, last, marks, bars)


def _marks(series: Series, x_scale: _Scale, y_scale: _Scale) -> list[tuple[float, float, str, str]]:
    """Texts beside their points, towards the middle of the chart, where a line that rises leaves room."""
    out = []
    for (x, y), text in zip(series.points, series.marks, strict=False):  # perhaps there are none
        if y is not None and _is_number(y):
            px, py = round(x_scale(x), 1), round(y_scale(y), 1)
            left = px < (x_scale.start + x_scale.end) / 2
            out.append((px + 6, py + 14, text, "start") if left else (px - 6, py - 6, text, "end"))
    return out


def _bars(series: Series, x_scale: _Scale, y_scale: _Scale) -> list[tuple[float, float, float, float]]:
    """Intervals as lines through their points: upright ones of y, level ones of x."""
    out = []
    for (x, y), bar in zip(series.points, series.bars, strict=False):
        if bar and _is_number(y):
            out.append((x_scale(x), y_scale(bar[0]), x_scale(x), y_scale(bar[1])))
    for (_, y), span in zip(series.points, series.spans, strict=False):
        if span and y is not None and _is_number(y):
            out.append((x_scale(span[0]), y_scale(y), x_scale(span[1]), y_scale(y)))
    return out


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.5
        return round(self.start + share * (self.end - self.start), 2)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
