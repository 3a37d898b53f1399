"""Read the compiler's schedule of each fusion: bundles of instructions, one a cycle.

A matrix product runs its loop `iteration_bounds` times over straight-line code, which libtpu dumps
on request. The cycles in the HLO's text (`estimated_cycles`) come from a model from before
scheduling: for the products of an MLP of 5120 x 21504 and their gradients on v5e they are 1.17 to
1.83 times the bundles (libtpu 0.0.42.1). Bundles do not include waiting for memory or for the
matrix unit; bytes and the unit's peak account for that.
"""

import math
import pathlib
import re
from collections.abc import Mapping

from blip3o_jax.bench.cost.hlo import Op, Program

END = 500_000  # bytes; a bundle takes a line or some, and a loop begins after a few dozen


def dump_flags(directory: pathlib.Path) -> str:
    """Return the flags for LIBTPU_INIT_ARGS that write the schedules, and nothing else, into
    `directory`.
    """
    # The name of a pass is a regular expression; "schedule-analysis_final_bundles" is another.
    return (
        f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=^final_bundles$"
    )


def read(directory: pathlib.Path) -> dict[str, int]:
    """Return {operation: bundles of one iteration of its loop} of the schedules in `directory`; {}
    where there are none.
    """
    found = {}
    for path in directory.glob("*-final_bundles.txt"):
        name = re.fullmatch(r"\d+-(.+)-\d+-final_bundles", path.stem)
        if name and (bundles := _turn(*_ends(path))):
            found[name[1]] = bundles
    return found


def _ends(path: pathlib.Path) -> tuple[str, str]:
    """Return the beginning and the end of a text of up to tens of megabytes."""
    with path.open("rb") as file:
        head = file.read(END)
        file.seek(max(0, path.stat().st_size - END))
        return head.decode("utf-8", "replace"), file.read().decode("utf-8", "replace")


def _turn(head: str, tail: str) -> int:
    """Return the number of bundles from the loop's first to the program's last. Bundles before the
    loop run once, and those after it are few."""
    # "LB" marks the first bundle of a loop's body.
    body = re.search(r"^ *(0x[0-9a-f]+|0) +LB", head, flags=re.M)
    addresses = re.findall(r"^ *(0x[0-9a-f]+) ", tail, flags=re.M)
    return int(addresses[-1], 16) - int(body[1], 16) + 1 if body and addresses else 0


class Schedules:
    """Hold the cycles of matrix products, from their bundles. The compiler schedules one of several
    identical fusions."""

    def __init__(self, program: Program, bundles: Mapping[str, int], cores: int):
        self._bundles, self._cores = bundles, cores
        operations = (op for computation in program.computations.values() for op in computation.ops)
        self._alike = {
            _window(op): bundles[op.name] for op in operations if op.name in bundles and _window(op)
        }

    def cycles(self, op: Op) -> float | None:
        """Return the cycles of an operation with a loop over windows; None where its schedule is
        not known. The cores of a device share them.
        """
        window = _window(op)
        bundles = self._bundles.get(op.name) or self._alike.get(window)
        bounds = re.search(r'"iteration_bounds":\[([^\]]+)\]', window)
        if not bundles or not bounds:
            return None
        return bundles * math.prod(map(int, re.findall(r"\d+", bounds[1]))) / self._cores


def _window(op: Op) -> str:
    """Return its shape and the windows that its loop goes over, or "" for an operation without."""
    found = re.search(r'"window_config":(\{[^}]*"iteration_bounds":\["[^}]*\})', op.attributes)
    return f"{op.shape} {found[1]}" if found else ""
