"""Write the page of `bench sharding`: one HTML file with SVG charts that loads nothing."""

import html
import pathlib
import string
from collections.abc import Iterable, Sequence
from typing import Any

from blip3o_jax.bench.cost.cost import LIMITERS
from blip3o_jax.bench.isolated_process import Row
from blip3o_jax.bench.sharding import table
from blip3o_jax.bench.sharding.largest_batch import outcome
from blip3o_jax.bench.sharding.table import GIB

MEASURED = {"median": "median_s", "fastest": "fastest_s", "slowest": "slowest_s"}
# Units of the drawings; the page scales them to the width there is.
WIDTH, LABEL, BAR = 900, 270, 22
PLOT_WIDTH, PLOT_HEIGHT, MARGIN = 900, 420, 74


def render(report: dict[str, Any]) -> str:
    """Return the page of a report."""
    template = string.Template(
        pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    )
    rows = report["rows"]
    fits = [row for row in rows if "step_s" in row]
    return template.substitute(
        title=_text("Sharding: " + ", ".join(dict.fromkeys(row["topology"] for row in rows))),
        command=_text(report["command"]),
        made=_text(
            f"{report['date']}; "
            + ", ".join(f"{name} {v}" for name, v in report["versions"].items())
        ),
        about=_text(about(report)),
        heads="".join(
            f"<th><button>{_text(column.name)}</button></th>"
            for column in (*table.START, *table.columns(report))
        ),
        rows="".join(_table_row(row, report) for row in rows),
        measured='<li><i class="measured"></i>measured</li>' if report["measured_steps"] else "",
        bars=bars(fits),
        front=front(fits),
        details="".join(map(_details, fits)),
    )


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _name(row: Row) -> str:
    return f"{row['topology']} {row['strategy']}"


def about(report: dict[str, Any]) -> str:
    """Return the paragraph that says what the figures mean."""
    useful = {
        "train": "MFU counts the work of the step once, without recomputation for the backward "
        "pass.",
        "rollout": "A rollout is one batch of prompts, from their ids to images. MFU counts the "
        "work once, and attention without the empty slots of the cache.",
    }[report["step"]]
    if report["measured_steps"]:
        return f"{table.how(report)} {useful}"
    return (
        "Compiled by the TPU compiler, without a TPU. The compiler decides whether a step fits; "
        "seconds, MFU and rates are predicted from the compiled program, never measured. "
        f"{useful}"
    )


def _table_row(row: Row, report: dict[str, Any]) -> str:
    first, *start = (_cell(*column.value(row)) for column in table.START)
    head = first.replace("<td", '<th scope="row"', 1).replace("</td>", "</th>") + "".join(start)
    columns = table.columns(report)
    if "step_s" not in row:
        why = f"<b>{_text(row['status'])}</b>: {_text(row['error'])}"
        return f'<tr class="no">{head}<td colspan="{len(columns)}">{why}</td></tr>'
    return f"<tr>{head}{''.join(_cell(*column.value(row)) for column in columns)}</tr>"


def _cell(text: str, value: float | None = None) -> str:
    data = "" if value is None else f' data-value="{value}"'
    return f"<td{data}>{_text(text)}</td>"


def bars(rows: Sequence[Row]) -> str:
    """Return bars of predicted seconds, stacked by limiter; a measured time is a line below."""
    longest = max((max(row["step_s"], _measured(row) or 0) for row in rows), default=0) or 1
    shapes, room = [], WIDTH - LABEL - (200 if any(map(_measured, rows)) else 70)
    for i, row in enumerate(rows):
        x, y = float(LABEL), i * (BAR + 8)
        shapes.append(
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{_text(_name(row))}</text>'
        )
        for limiter in LIMITERS:
            wide = room * row["seconds"].get(limiter, 0) / longest
            title = f"{limiter} {row['seconds'].get(limiter, 0):.4f} s"
            shapes.append(
                f'<rect class="{limiter}" x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{BAR}">'
                f"<title>{title}</title></rect>"
            )
            x += wide
        text = f"{table.seconds(row['step_s'])} s"
        if measured := _measured(row):
            wide, text = room * measured / longest, f"{text}, measured {table.seconds(measured)} s"
            shapes.append(
                f'<rect class="measured" x="{LABEL}" y="{y + BAR}" width="{wide:.1f}" height="4"/>'
            )
            x = max(x, LABEL + wide)
        shapes.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{text}</text>')
    return _svg(WIDTH, max(1, len(rows)) * (BAR + 8), "predicted seconds by limiter", shapes)


def _measured(row: Row) -> float | None:
    return row["measured"]["median_s"] if "measured" in row else None


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point beats in both coordinates; less is better."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def front(rows: Sequence[Row]) -> str:
    """Plot the memory of a device against chip-seconds for an example; the line joins the Pareto
    front."""
    if not rows:
        return "<p>Nothing fits.</p>"
    points = [(row["memory"]["total"] / GIB, 1 / table.rate(row)) for row in rows]
    most_x, most_y = (1.1 * max(p[i] for p in points) for i in (0, 1))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = point[0] / most_x, point[1] / most_y
        return MARGIN + (PLOT_WIDTH - 2 * MARGIN) * x, PLOT_HEIGHT - MARGIN - (
            PLOT_HEIGHT - 2 * MARGIN
        ) * y

    right, bottom = PLOT_WIDTH - MARGIN, PLOT_HEIGHT - MARGIN
    shapes = [f'<path class="axis" d="M{MARGIN} {MARGIN}V{bottom}H{right}"/>']
    for part in (0.25, 0.5, 0.75, 1.0):
        x, y = place((part * most_x, part * most_y))
        shapes.append(
            f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{part * most_x:.3g}</text>'
        )
        shapes.append(
            f'<text x="{MARGIN - 6}" y="{y + 4:.0f}" text-anchor="end">{part * most_y:.3g}</text>'
        )
    shapes.append(f'<text x="{right}" y="{bottom + 38}" text-anchor="end">GiB of a device</text>')
    shapes.append(f'<text x="{MARGIN}" y="{MARGIN - 14}">{_axis(rows[0])}</text>')
    best = [place(point) for point in pareto(points)]
    shapes.append(f'<path class="front" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in best)}"/>')
    for row, point in zip(rows, points, strict=True):
        x, y = place(point)
        title = f"{_name(row)}: {point[0]:.1f} GiB, {point[1]:.4f} chip-seconds"
        shapes.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{_text(title)}</title></circle>'
        )
        # On the side where there is room for it.
        at, anchor = (x + 8, "start") if x < PLOT_WIDTH / 2 else (x - 8, "end")
        shapes.append(
            f'<text x="{at:.1f}" y="{y - 6:.1f}" text-anchor="{anchor}">{_text(_name(row))}</text>'
        )
    return _svg(PLOT_WIDTH, PLOT_HEIGHT, "memory against time", shapes)


def _axis(row: Row) -> str:
    what = "an image" if row.get("step") == "rollout" else "an example"
    return f"chip-seconds for {what}, {'measured' if 'measured' in row else 'predicted'}"


def _svg(width: int, height: int, label: str, shapes: Iterable[str]) -> str:
    size = f'viewBox="0 0 {width} {height}"'
    return f'<svg {size} role="img" aria-label="{_text(label)}">{"".join(shapes)}</svg>'


def _details(row: Row) -> str:
    memory = [(name, f"{size / GIB:.3f} GiB") for name, size in row["memory"].items()]
    work = [
        (f"{part}, {direction}", f"{value / 1e12:.3f} TFLOP")
        for part, passes in row["flops"].items()
        for direction, value in passes.items()
    ]
    work += [("read and written in HBM", f"{row['hbm_bytes'] / GIB:.1f} GiB")]
    times = [
        (part, f"{table.seconds(seconds)} s")
        for part, seconds in sorted(row["part_seconds"].items(), key=lambda kv: -kv[1])
    ]
    moved = [
        (
            f"{c['kind']} over {' x '.join(c['axes']) or 'nothing'} ({c['network']})",
            f"{c['count']} times, {c['size'] / GIB:.2f} GiB, {c['seconds']:.4f} s, of it exposed "
            f"{c['exposed']:.4f} s",
        )
        for c in sorted(row["collectives"], key=lambda c: -c["seconds"])
    ]
    measured = row.get("measured", {})
    timings = [
        (name, f"{table.seconds(measured[key])} s")
        for name, key in MEASURED.items()
        if key in measured
    ]
    if "peak_bytes" in measured:
        timings.append(("most memory of a device", f"{measured['peak_bytes'] / GIB:.2f} GiB"))
    tried = [
        (f"{t['batch_per_chip']:g} a chip", outcome(t).split("a chip ", 1)[1])
        for t in row.get("tried", ())
    ]
    unknown = [
        (name, f"{u['count']} times, {u['seconds']:.4f} s") for name, u in row["unknown"].items()
    ]
    held = [
        (array["array"], f"{array['bytes'] / GIB:.3f} GiB, {array['of']}")
        for array in row["largest"]
    ]
    held += [("should not be there", line) for line in row["unsharded"]]
    tables = {
        "Bytes of a device": memory,
        "Largest arrays of a device": held,
        "Work of a device": work,
        "Predicted seconds by part": times,
        "Measured": timings,
        "Batches tried": tried,
        "Collectives": moved,
        "In no known class": unknown,
    }
    body = "".join(
        f"<h3>{_text(name)}</h3>{_pairs(pairs)}" for name, pairs in tables.items() if pairs
    )
    return f"<details><summary>{_text(_name(row))}</summary>{body}</details>"


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in pairs)
    return f"<table><tbody>{rows}</tbody></table>"
