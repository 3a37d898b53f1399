"""Define the columns of a report, for the terminal and for the page; the options determine which
are shown."""

import dataclasses
from collections.abc import Callable
from typing import Any

from blip3o_jax.bench.isolated_process import Row

GIB = 2**30
# The parts of a rollout, by the scopes of their operations; what is left is the connector and the
# drawing of noise.
ROLLOUT_PARTS = ("prefill", "decode", "dit", "vae")


@dataclasses.dataclass(frozen=True)
class Column:
    """Define a column by `value` of a row: its text, and the number to sort by where there is one.
    `page_only`: too wide for a terminal."""

    name: str
    value: Callable[[Row], tuple[str, float | None]]
    left: bool = False
    page_only: bool = False


def _text(key: str) -> Callable[[Row], tuple[str, None]]:
    return lambda row: (row[key], None)


def _number(form: str, *path: str) -> Callable[[Row], tuple[str, float | None]]:
    def value(row: Row) -> tuple[str, float | None]:
        found: Any = row
        for key in path:
            found = found.get(key, 0.0)
        return form.format(found), found

    return value


def _mesh(row: Row) -> tuple[str, None]:
    return " ".join(
        f"{axis} {size}" for axis, size in row.get("mesh", {}).items() if size > 1
    ), None


def _gib(row: Row) -> tuple[str, float]:
    size = row["memory"]["total"]
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.3f}", size


def _exposed(row: Row) -> tuple[str, float]:
    fraction = sum(c["exposed"] for c in row["collectives"]) / row["step_s"]
    return f"{fraction:.1%}", fraction


def _spread(row: Row) -> tuple[str, float]:
    measured = row["measured"]
    width = measured["slowest_s"] - measured["fastest_s"]
    return f"{seconds(measured['fastest_s'])}-{seconds(measured['slowest_s'])}", width


def seconds(value: float) -> str:
    """Format seconds with three decimals, or three digits below a tenth of a second."""
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def _seconds(*path: str) -> Callable[[Row], tuple[str, float | None]]:
    number = _number("{}", *path)

    def value(row: Row) -> tuple[str, float | None]:
        found = number(row)[1] or 0.0
        return seconds(found), found

    return value


START = (
    Column("topology", _text("topology"), left=True),
    Column("strategy", _text("strategy"), left=True),
    Column("mesh", _mesh, left=True, page_only=True),
    Column("batch/chip", _number("{:g}", "batch_per_chip")),
)


def columns(report: dict[str, Any]) -> tuple[Column, ...]:
    """Return the columns of rows that fit, after START, which every row has."""
    rollout, measured = report["step"] == "rollout", bool(report["measured_steps"])
    name = "rollout" if rollout else "step"
    times = [Column(f"{name} s", _seconds("step_s"))]
    source: tuple[str, ...] = ()
    if measured:
        source = ("measured",)
        times = [
            Column("predicted s", _seconds("step_s")),
            Column("measured s", _seconds("measured", "median_s")),
            Column("spread s", _spread),
            Column("measured / predicted", _number("{:.2f}", "measured", "ratio")),
        ]
    parts = (
        [Column(f"{part} s", _seconds("part_seconds", part)) for part in ROLLOUT_PARTS]
        if rollout
        else []
    )
    return (
        Column("GiB/device", _gib),
        *times,
        *parts,
        Column("MFU", _number("{:.1%}", *source, "mfu")),
        Column("limiter", _text("limiter"), left=True),
        Column("exposed", _exposed),
        Column(
            "images/s/chip" if rollout else "ex/s/chip",
            _number("{:.2f}", *source, "examples_per_s_per_chip"),
        ),
        Column("compile s", _number("{:.0f}", "compile_s")),
        Column("unknown", _number("{:.1%}", "unknown_fraction")),
    )


def rate(row: Row) -> float:
    """Return examples or images a second and chip: the measured rate where there is one."""
    return row.get("measured", row).get("examples_per_s_per_chip", 0.0)


def how(report: dict[str, Any]) -> str:
    """Return the sentences that say how the times are obtained."""
    if not report["measured_steps"]:
        return "Times are predicted from the compiled program, not measured."
    return (
        f"Predicted: from the compiled program and a device's rates ({report['chip']['source']}). "
        "Measured: the median of "
        f"{report['measured_steps']} turns after a warm-up, which MFU and rate are of too; the "
        "spread goes from the fastest to "
        "the slowest. Limiter, exposed fraction and seconds by part are predicted."
    )
