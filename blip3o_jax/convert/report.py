"""Hold the comparison of a checkpoint with PyTorch files: as values, as JSON and as tables."""

import dataclasses
import math
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

# Of outputs, in float32 on both sides: rounding makes some 1e-6 of it, in another order of the
# sums.
TOLERANCE = 1e-5
LISTED = 10  # tensors that differ, for each part


@dataclasses.dataclass(frozen=True)
class Difference:
    """A tensor by its full name in PyTorch's files; `error` is its greatest difference over its
    greatest absolute value.
    """

    tensor: str
    error: float


@dataclasses.dataclass(frozen=True)
class Output:
    """`error`: norm of the difference over the norm of PyTorch's values, and for indices None.
    `agreement`: share of equal indices, None for all else. `first_layer`: the first to differ by
    more than the tolerance, by its full name in PyTorch's model; "" where no stacked layer does, or
    nothing differs.
    """

    name: str
    error: float | None
    agreement: float | None = None
    first_layer: str = ""
    first_layer_error: float | None = None

    @property
    def ok(self) -> bool:
        if self.error is None:
            return self.agreement == 1.0
        return self.error <= TOLERANCE  # not so if it is NaN


@dataclasses.dataclass(frozen=True)
class PartReport:
    """`tensors` were compared, and those of `differing` are not equal bit by bit."""

    part: str
    tensors: int
    differing: tuple[Difference, ...]
    outputs: tuple[Output, ...]

    @property
    def ok(self) -> bool:
        return not self.differing and all(output.ok for output in self.outputs)


@dataclasses.dataclass(frozen=True)
class Report:
    """`notes`: what was not compared, and settings that are not the same on both sides."""

    torch: str
    checkpoint: str
    seed: int
    parts: tuple[PartReport, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return all(part.ok for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON, with every verdict; numbers that are not finite become null."""
        parts = []
        for part in self.parts:
            outputs = [dataclasses.asdict(output) | {"ok": output.ok} for output in part.outputs]
            parts.append(dataclasses.asdict(part) | {"outputs": outputs, "ok": part.ok})
        return _finite(
            dataclasses.asdict(self) | {"ok": self.ok, "tolerance": TOLERANCE, "parts": parts}
        )


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Return the norm of the difference over the norm of what is expected; infinite for another
    shape.
    """
    if got.shape != want.shape:
        return math.inf
    got, want = got.astype(np.float64), want.astype(np.float64)
    difference, size = float(np.linalg.norm(got - want)), float(np.linalg.norm(want))
    return difference / size if size else (math.inf if difference else 0.0)


def print_report(report: Report) -> None:
    """Print a table for each part, then all that differs by full name, then the verdict, on
    standard output.
    """
    console = Console()
    for part in report.parts:
        table = Table(title=part.part, title_justify="left")
        for name, width in (("compared", 24), ("difference", 18), ("verdict", 8)):
            table.add_column(
                name, min_width=width, justify="left" if name == "compared" else "right"
            )
        if part.tensors:
            worst = max((d.error for d in part.differing), default=0.0)
            found = f"greatest {worst:.1e}" if part.differing else "bitwise equal"
            table.add_row(f"{part.tensors} tensors", found, _verdict(not part.differing))
        for output in part.outputs:
            found = (
                f"{100 * output.agreement:.2f} % agree"
                if output.error is None
                else f"{output.error:.1e}"
            )
            table.add_row(output.name, found, _verdict(output.ok))
        console.print(table)
    print_line = lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
    for part in report.parts:
        for difference in part.differing[:LISTED]:
            print_line(f"{part.part}: {difference.tensor} differs, by {difference.error:.1e}")
        if len(part.differing) > LISTED:
            print_line(f"{part.part}: {len(part.differing)} tensors differ in all")
        for output in part.outputs:
            if not output.ok and output.first_layer:
                print_line(
                    f"{part.part}: {output.name} part at {output.first_layer}, by {output.first_layer_error:.1e}"
                )
            elif not output.ok:
                print_line(f"{part.part}: {output.name} part outside the stacked layers")
    for note in report.notes:
        print_line(f"note: {note}")
    print_line(
        f"{report.checkpoint} is {'the same model as' if report.ok else 'NOT the same model as'} {report.torch}"
    )


def _verdict(ok: bool) -> str:
    return "ok" if ok else "DIFFERS"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
