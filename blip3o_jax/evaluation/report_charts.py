"""Render the charts of the report: line charts as SVG text, and id grids as colours."""

import colorsys
import html
import json
import math
from collections.abc import Sequence

import numpy as np

# The drawing's own units; the page scales it to the width there is.
WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MAX_POINTS = 240  # more than the pixels of a chart can resolve
LOG_RATIO = 30  # a metric that falls by more than this is drawn on a logarithmic scale
GOLDEN = (5**0.5 - 1) / 2


def wilson_interval(fraction: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a fraction of `count` independent trials, at 95 % by
    default: E. B. Wilson, Probable inference (1927), JASA 22."""
    if not count:
        return 0.0, 1.0
    center = (fraction + z * z / (2 * count)) / (1 + z * z / count)
    variance = fraction * (1 - fraction) / count + z * z / (4 * count**2)
    half = z * math.sqrt(variance) / (1 + z * z / count)
    return max(0.0, center - half), min(1.0, center + half)


def line_chart(
    name: str,
    steps: Sequence[int],
    values: Sequence[float],
    held_out: tuple[Sequence[int], Sequence[float]] | None = None,
) -> str:
    """Return one <figure> with a metric over steps, and the same metric of held-out records as a
    dashed line. The page's script shows the value under the pointer from `data-points` (step,
    value, x, y)."""
    steps_, values_ = _thin(np.asarray(steps, np.float64), np.asarray(values, np.float64))
    title = html.escape(name)
    if not len(values_):
        return (
            f'<figure class="chart"><figcaption><span>{title}</span> '
            "<output>no values</output></figcaption></figure>"
        )
    others = _thin(*(np.asarray(x, np.float64) for x in held_out or ((), ())))
    everything = np.concatenate([values_, others[1]])
    low, high = float(everything.min()), float(everything.max())
    # Only for a metric that falls far: its end would be a flat line at the bottom of a linear axis.
    logarithmic = low > 0 and high > LOG_RATIO * low and values_[0] > values_[-1]
    ticks = _log_ticks(low, high) if logarithmic else _ticks(*_range(low, high))
    scale = np.log10 if logarithmic else np.asarray
    bottom, top = float(scale(min(low, ticks[0]))), float(scale(max(high, ticks[-1])))
    # The steps of the held-out metric may end after those of the other one.
    first, last = float(steps_[0]), float(max(steps_[-1], *others[0][-1:], steps_[0]))

    def place_x(step: float | np.ndarray) -> np.ndarray:
        return LEFT + (WIDTH - LEFT - RIGHT) * (np.asarray(step) - first) / max(last - first, 1)

    def place_y(value: float | np.ndarray) -> np.ndarray:
        return (
            HEIGHT
            - BOTTOM
            - (HEIGHT - TOP - BOTTOM) * (scale(value) - bottom) / ((top - bottom) or 1)
        )

    x, y = place_x(steps_), place_y(values_)
    rows = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place_y(t):.1f}" y2="{place_y(t):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{place_y(t) + 3.5:.1f}" text-anchor="end">{_short(t)}</text>'
        for t in ticks
    )
    columns = "".join(
        f'<line class="mark" x1="{place_x(t):.1f}" x2="{place_x(t):.1f}" y1="{HEIGHT - BOTTOM}" '
        f'y2="{HEIGHT - BOTTOM + 4}"/>'
        f'<text x="{place_x(t):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{t:,.0f}</text>'
        for t in _ticks(first, last, inside=True)
    )
    paths = f'<path d="{_path(x, y)}"/>'
    key = ""
    if len(others[0]):
        dashed = _path(place_x(others[0]), place_y(others[1]))
        paths += f'<path class="held-out" d="{dashed}"/>'
        key = f' <small class="key">held out, last {_short(float(others[1][-1]))}</small>'
    points = [
        [round(s), float(f"{v:.4g}"), round(float(a), 1), round(float(b), 1)]
        for s, v, a, b in zip(steps_, values_, x, y, strict=True)
    ]
    axis = " <small>log scale</small>" if logarithmic else ""
    return (
        f'<figure class="chart"><figcaption><span>{title}{axis}{key}</span> <output>last '
        f"{_short(values_[-1])}</output></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}: from '
        f"{_short(values_[0])} to "
        f'{_short(values_[-1])}" '
        f'data-points="{html.escape(json.dumps(points, separators=(",", ":")))}">'
        f'<g class="axis">{rows}{columns}</g>{paths}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/><circle r="3.5" cx="{x[-1]:.1f}" '
        f'cy="{y[-1]:.1f}"/>'
        "</svg></figure>"
    )


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def colours(ids_HW: np.ndarray) -> np.ndarray:
    """Return a colour for each id, the same in all maps: uint8 [height, width, 3]. Hues a golden
    angle apart keep neighbours in the codebook distinct; brightness varies too, so that maps are
    also legible without colour."""
    ids_HW = np.asarray(ids_HW)
    unique, inverse = np.unique(ids_HW, return_inverse=True)
    palette = [
        colorsys.hls_to_rgb(
            (int(i) * GOLDEN) % 1, 0.32 + 0.42 * ((int(i) * 0.7548776662) % 1), 0.45
        )
        for i in unique
    ]
    return (255 * np.asarray(palette)).round().astype(np.uint8)[inverse.reshape(ids_HW.shape)]


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the finite points, averaged in runs where there are more than the chart can show; the
    last point is never averaged."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(steps) <= MAX_POINTS:
        return steps, values
    cuts = np.linspace(0, len(steps) - 1, MAX_POINTS).astype(int)[:-1]
    counts = np.diff([*cuts, len(steps) - 1])
    means = [np.add.reduceat(a[:-1], cuts) / counts for a in (steps, values)]
    return np.append(means[0], steps[-1]), np.append(means[1], values[-1])


def _range(low: float, high: float) -> tuple[float, float]:
    """Return the axis range: from zero where zero is near, else only around the values."""
    if low == high:
        return (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    return (0.0, high) if 0 < low < 0.5 * high else (low, high)


def _ticks(low: float, high: float, *, inside: bool = False, count: int = 4) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) that span [low, high], or are in it."""
    rough = max(high - low, 1e-12) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    slack = 1e-9  # a bound that is itself a tick must count as one despite rounding
    if inside:
        first, last = math.ceil(low / step - slack), math.floor(high / step + slack)
    else:
        first, last = math.floor(low / step + slack), math.ceil(high / step - slack)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten inside [low, high], at most five; where there are few, at most five
    of their multiples by 1, 2 and 5."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [10.0**p for p in powers if low <= 10.0**p <= high]
    if len(ticks) < 3:
        return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return ticks[:: -(-len(ticks) // 5)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
