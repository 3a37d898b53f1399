"""Format the elements that all sections of a report use: text, numbers, images, bars, tables."""

import base64
import html
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax.evaluation import report_charts as charts


def data_uri(image_HWC: np.ndarray) -> str:
    """Return a uint8 image [height, width, 3] as a PNG data URI."""
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[-1] != 3:
        raise ValueError(
            f"a report's image must be uint8 [height, width, 3], not {image_HWC.dtype} "
            f"{image_HWC.shape}"
        )
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def img(image_HWC: np.ndarray, alt: str) -> str:
    # Small images are shown enlarged: as the pixels they are, not blurred.
    style = ' class="pixels"' if max(image_HWC.shape[:2]) <= 128 else ""
    return f'<img{style} src="{data_uri(image_HWC)}" alt="{escape(alt)}">'


def bar(fraction: float, count: int, marks: str) -> str:
    """Return the cell with a bar of a fraction of `count` prompts, its interval, and `marks`."""
    low, high = charts.wilson_interval(fraction, count)
    return (
        f'<td class="bar"><span class="track"><b style="width:{100 * fraction:.2f}%"></b>'
        f'<u style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></u>{marks}</span></td>'
    )


def with_interval(fraction: float, count: int) -> str:
    low, high = charts.wilson_interval(fraction, count)
    return (
        f"<strong>{percent(fraction)}</strong> <small>{100 * low:.0f} to {100 * high:.0f}</small>"
    )


def scale(columns: int) -> str:
    """Return the row with the axis of the bars above it, and `columns` cells after it."""
    ticks = "".join(f'<span style="left:{tick}%">{tick} %</span>' for tick in (0, 25, 50, 75, 100))
    return (
        f'<tr class="scale"><td></td><td class="bar"><div>{ticks}</div></td>'
        f'<td colspan="{columns}">95 % interval, Wilson</td></tr>'
    )


def label(name: str) -> str:
    return name.replace("_", " ")


def table(rows: Iterable[tuple[str, Any]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
        for key, value in rows
    )
    return f'<div class="scroll"><table class="settings"><tbody>{body}</tbody></table></div>'
