"""Draws line and scatter charts as SVG strings: scales, round ticks, thinned curves and CSS.

Standard library only. Takes points and returns markup; knows nothing of runs or of the page. Text
keeps its size on every screen, because the style sheet sets the font size by screen width.
"""

import html
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

Point = tuple[float, float]
MAX_DRAWN_POINTS = 800
NUM_COLORS = 7


class Series(NamedTuple):
    """One curve: `points` are finite and ascending in x; `mean` is drawn over them in bold."""

    label: str
    points: Sequence[Point]
    color: int = 0
    mean: Sequence[Point] = ()

    @property
    def color_class(self) -> str:
        """The CSS classes of the curve; after the last colour the first one follows, dashed."""
        return f"c{self.color % NUM_COLORS}" + (" dashed" if self.color >= NUM_COLORS else "")


class Axis(NamedTuple):
    """A data range, the ticks inside it and their labels."""

    low: float
    high: float
    ticks: list[float]
    labels: list[str]
    is_log: bool = False

    def fraction(self, value: float) -> float:
        """Position of a value between low (0) and high (1)."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)


class Frame(NamedTuple):
    """The drawing area in SVG units: the size, then the margins that hold the tick labels."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int

    @property
    def base(self) -> int:
        """The y of the x axis."""
        return self.height - self.bottom


SMALL = Frame(300, 178, 46, 12, 12, 38)
LARGE = Frame(600, 400, 56, 14, 14, 46)


def line_chart(
    series: Sequence[Series],
    *,
    description: str,
    x_label: str = "step",
    from_zero: bool = False,
    frame: Frame = SMALL,
    best: Point | None = None,
) -> str:
    """An inline <svg> of curves over a shared x axis; y is logarithmic where `wants_log` says so.

    `description` is the text for screen readers. `from_zero` makes y linear and start at 0. `best`
    is a point to mark with a ring. Raises ValueError without a point.
    """
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    if not ys:
        raise ValueError("expected at least one point to draw, got none; leave the chart out")
    num_ticks = 6 if frame.width >= LARGE.width else 4
    x_axis = _tight_axis(min(xs), max(xs), num_ticks)
    is_log = wants_log(ys) and not from_zero
    y_axis = log_axis(ys, num_ticks) if is_log else linear_axis(ys, num_ticks, from_zero)
    place = _make_place(frame, x_axis, y_axis)
    marks = [mark for s in series for mark in _curve(s, place)]
    if best:
        x, y = place(best)
        marks.append(f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>')
    return _svg(frame, description, [*_grid(frame, x_axis, y_axis, x_label), *marks])


class Dot(NamedTuple):
    """A point of a scatter chart. `kind` is a CSS class; the label is a tooltip or also drawn."""

    label: str
    point: Point
    kind: str
    is_labelled: bool = True


def scatter_chart(
    dots: Sequence[Dot],
    front: Sequence[Point],
    *,
    description: str,
    x_label: str,
    frame: Frame = LARGE,
) -> str:
    """An inline <svg> of single points, with a stepped line along `front` (ascending in x).

    The x axis starts at 0, or is logarithmic where `wants_log` says so. Raises ValueError without
    a point.
    """
    if not dots:
        raise ValueError("expected at least one point to draw, got none; leave the chart out")
    xs, ys = ([dot.point[i] for dot in dots] for i in (0, 1))
    x_axis = log_axis(xs, 6) if wants_log(xs) else linear_axis(xs, 6, from_zero=True)
    y_axis = linear_axis(ys, 6)
    place = _make_place(frame, x_axis, y_axis)
    marks = []
    if front:
        (x, y), *later = map(place, front)
        steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in later)
        marks.append(f'<path class="front" d="M{x:.1f} {y:.1f}{steps}"/>')
    for dot in dots:
        x, y = place(dot.point)
        label = html.escape(dot.label)
        marks.append(
            f'<circle class="dot {dot.kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
            f"<title>{label}</title></circle>"
        )
        if dot.is_labelled:
            side = ' class="end"' if x > frame.width * 0.8 else ' class="start"'
            marks.append(f'<text{side} x="{x:.1f}" y="{y - 9:.1f}">{label}</text>')
    return _svg(frame, description, [*_grid(frame, x_axis, y_axis, x_label), *marks])


def _make_place(frame: Frame, x_axis: Axis, y_axis: Axis) -> Callable[[Point], Point]:
    """A function from data to SVG coordinates."""

    def place(point: Point) -> Point:
        x, y = x_axis.fraction(point[0]), y_axis.fraction(point[1])
        inner = frame.width - frame.left - frame.right
        return frame.left + x * inner, frame.base - y * (frame.base - frame.top)

    return place


def _svg(frame: Frame, description: str, marks: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{html.escape(description)}">{"".join(marks)}</svg>'
    )


def _curve(series: Series, place: Callable[[Point], Point]) -> Iterator[str]:
    color = series.color_class
    points = [place(p) for p in thin(series.points)]
    if len(points) > 1:
        faint = " faint" if series.mean else ""
        yield f'<polyline class="curve {color}{faint}" points="{_coordinates(points)}"/>'
    if series.mean:
        mean = [place(p) for p in thin(series.mean)]
        yield f'<polyline class="mean {color}" points="{_coordinates(mean)}"/>'
    if len(points) <= 25:
        for x, y in points:
            yield f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>'


def _coordinates(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _grid(frame: Frame, x_axis: Axis, y_axis: Axis, x_label: str) -> Iterator[str]:
    right = frame.width - frame.right
    for tick, label in zip(y_axis.ticks, y_axis.labels, strict=True):
        y = frame.base - y_axis.fraction(tick) * (frame.base - frame.top)
        yield f'<path class="grid" d="M{frame.left} {y:.1f}H{right}"/>'
        yield f'<text class="y" x="{frame.left - 6}" y="{y:.1f}" dy=".35em">{label}</text>'
    yield f'<path class="axis" d="M{frame.left} {frame.base}H{right}"/>'
    for tick, label in zip(x_axis.ticks, x_axis.labels, strict=True):
        fraction = x_axis.fraction(tick)
        x = frame.left + fraction * (right - frame.left)
        side = ' class="end"' if fraction > 0.97 else ""
        yield f'<path class="axis" d="M{x:.1f} {frame.base}v4"/>'
        yield f'<text{side} x="{x:.1f}" y="{frame.base + 6}" dy=".95em">{label}</text>'
    yield (
        f'<text class="unit" x="{(frame.left + right) // 2}" y="{frame.height - 3}">'
        f"{html.escape(x_label)}</text>"
    )


def wants_log(values: Sequence[float]) -> bool:
    """True where positive values span a factor of 30 or more, ignoring the smallest 1 %."""
    ordered = sorted(values)
    return ordered[0] > 0 and ordered[-1] >= 30 * ordered[len(ordered) // 100]


def linear_axis(values: Sequence[float], num_ticks: int, from_zero: bool = False) -> Axis:
    """An axis that ends on round ticks at or beyond the data."""
    low, high = min(values), max(values)
    if from_zero and low > 0:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = (0.0, high or 1.0) if from_zero and high >= 0 else (low - pad, high + pad)
    step = nice_step((high - low) / (num_ticks + 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks, tick_labels(ticks))


def log_axis(values: Sequence[float], num_ticks: int) -> Axis:
    """A log axis that ends on the data, with ticks at 1-2-5, at decades or at every k-th decade."""
    low, high = min(values), max(values)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in exponents for m in mantissas if low <= m * 10.0**e <= high]
        if len(ticks) <= num_ticks + 1:
            break
    ticks = ticks[:: max(1, math.ceil(len(ticks) / (num_ticks + 1)))]
    return Axis(
        low * 0.93, high * 1.07, ticks, [label for t in ticks for label in tick_labels([t])], True
    )


def _tight_axis(low: float, high: float, num_ticks: int) -> Axis:
    """An axis from the first to the last step; ticks are the round numbers between."""
    if low == high:
        return Axis(low - 1, high + 1, [low], tick_labels([low]))
    step = max(nice_step((high - low) / num_ticks), 1.0)
    ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Axis(low, high, ticks, tick_labels(ticks))


def nice_step(raw: float) -> float:
    """The smallest number of the form 1, 2 or 5 times a power of ten that is at least `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels for the ticks of one axis, all in one unit: 0.05, 1,500, 20k, 1.5M, 2e-5."""
    largest = max((abs(t) for t in ticks), default=0.0)
    if largest == 0:
        return ["0"] * len(ticks)
    if largest < 1e-3:
        exponent = math.floor(math.log10(largest) + 1e-9)
        return [f"{t / 10.0**exponent:.3g}e{exponent}" if t else "0" for t in ticks]
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= (unit if unit > 1e3 else 1e4):
            return [f"{t / unit:.4g}{suffix}" if t else "0" for t in ticks]
    step = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=largest)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{t:,.{decimals}f}" for t in ticks]


def thin(points: Sequence[Point], limit: int = MAX_DRAWN_POINTS) -> list[Point]:
    """At most `limit` points: the lowest and the highest of equal slices, so that spikes stay.

    The first and the last point always stay. Short curves are returned unchanged.
    """
    if len(points) <= limit:
        return list(points)
    inner, num_slices = points[1:-1], (limit - 2) // 2
    kept = [points[0]]
    for i in range(num_slices):
        start, stop = (len(inner) * k // num_slices for k in (i, i + 1))
        index = range(start, stop)
        low, high = (f(index, key=lambda j: inner[j][1]) for f in (min, max))
        kept += [inner[j] for j in sorted({low, high})]
    return [*kept, points[-1]]


def running_mean(points: Sequence[Point], width: int) -> list[Point]:
    """The centred mean over `width` (odd) points.

    At the start, where curves are steep, the window is narrower but still centred. At the end the
    window is cut off, so that the last value is an average too.
    """
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smooth = []
    for i, (x, _) in enumerate(points):
        start = i - min(width // 2, i)
        stop = min(i + min(width // 2, i) + 1, len(points))
        smooth.append((x, (sums[stop] - sums[start]) / (stop - start)))
    return smooth


CHART_CSS = """
.chart{display:block;width:100%;height:auto;overflow:visible}
.chart text{font-size:11px;fill:var(--soft);text-anchor:middle;font-variant-numeric:tabular-nums}
.chart .y,.chart .end{text-anchor:end}
.chart .start{text-anchor:start}
.wide .chart text{font-size:12px}
.grid,.axis,.curve,.mean,.front{fill:none;vector-effect:non-scaling-stroke}
.grid{stroke:var(--line);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1}
.curve{stroke-width:1.6;stroke-linejoin:round}
.mean{stroke-width:2;stroke-linejoin:round}
.front{stroke:var(--soft);stroke-width:1.4;stroke-dasharray:4 3}
.faint{stroke-width:1;opacity:.3}
.dashed{stroke-dasharray:5 3}.key.dashed{opacity:.55}
.best{fill:none;stroke:var(--ink);stroke-width:1.4}
"""
CHART_CSS += "".join(
    f".curve.c{i},.mean.c{i}{{stroke:var(--c{i})}}.dot.c{i},.key.c{i}"
    f"{{fill:var(--c{i});background:var(--c{i})}}"
    for i in range(NUM_COLORS)
)
