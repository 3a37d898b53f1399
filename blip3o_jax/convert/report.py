"""Hold the comparison of a checkpoint with PyTorch files, and print it or convert it to JSON."""

import dataclasses
import math
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

# The largest relative error of outputs, in float32 on both sides. Rounding causes about 1e-6, since
# the two sides add in different orders.
TOLERANCE = 1e-5
LISTED = 10  # the number of differing tensors to print for each part


@dataclasses.dataclass(frozen=True)
class Difference:
    """Hold a differing tensor's full name in PyTorch's files and its error.

    `error` is the largest absolute difference divided by the largest absolute value.
    """

    tensor: str
    error: float


@dataclasses.dataclass(frozen=True)
class Output:
    """Hold the comparison of one output.

    `error` is the norm of the difference divided by the norm of PyTorch's values, None for indices.
    `agreement` is the fraction of equal indices, None for other outputs. `first_layer` is the full
    name in PyTorch's model of the first layer that differs by more than the tolerance; "" if no
    stacked layer does.
    """

    name: str
    error: float | None
    agreement: float | None = None
    first_layer: str = ""
    first_layer_error: float | None = None

    @property
    def ok(self) -> bool:
        """Return whether the output agrees; NaN does not."""
        if self.error is None:
            return self.agreement == 1.0
        return self.error <= TOLERANCE


@dataclasses.dataclass(frozen=True)
class PartReport:
    """Hold the comparison of one part.

    `tensors` is the number compared; `differing` lists those that are not bitwise equal.
    """

    part: str
    tensors: int
    differing: tuple[Difference, ...]
    outputs: tuple[Output, ...]

    @property
    def ok(self) -> bool:
        """Return whether all tensors and outputs agree."""
        return not self.differing and all(output.ok for output in self.outputs)


@dataclasses.dataclass(frozen=True)
class Report:
    """Hold the whole comparison; `notes` list what was not compared and differing settings."""

    torch: str
    checkpoint: str
    seed: int
    parts: tuple[PartReport, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Return whether all parts agree."""
        return all(part.ok for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON with all verdicts; non-finite numbers become null."""
        parts = []
        for part in self.parts:
            outputs = [dataclasses.asdict(output) | {"ok": output.ok} for output in part.outputs]
            parts.append(dataclasses.asdict(part) | {"outputs": outputs, "ok": part.ok})
        return _finite(
            dataclasses.asdict(self) | {"ok": self.ok, "tolerance": TOLERANCE, "parts": parts}
        )


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Return the norm of the difference divided by the norm of `want`.

    It is infinite for different shapes.
    """
    if got.shape != want.shape:
        return math.inf
    got, want = got.astype(np.float64), want.astype(np.float64)
    difference = float(np.linalg.norm(got - want))
    size = float(np.linalg.norm(want))
    return difference / size if size else (math.inf if difference else 0.0)


def print_report(report: Report) -> None:
    """Print a table for each part, differing tensors by name, and the verdict to stdout."""
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
                f"{output.error:.1e}"
                if output.error is not None
                else f"{100 * (output.agreement or 0.0):.2f} % agree"
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
                    f"{part.part}: {output.name} first differs at {output.first_layer}, by "
                    f"{output.first_layer_error:.1e}"
                )
            elif not output.ok:
                print_line(f"{part.part}: {output.name} differs outside of the stacked layers")
    for note in report.notes:
        print_line(f"note: {note}")
    verdict = "the same model as" if report.ok else "NOT the same model as"
    print_line(f"{report.checkpoint} is {verdict} {report.torch}")


def _verdict(ok: bool) -> str:
    return "ok" if ok else "DIFFERS"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
