"""Count the iterations of a while loop of a compiled program."""

import re
from collections.abc import Sequence

from blip3o_jax.bench.cost.hlo import Computation, Op, Program


def trip_count(program: Program, computation: Computation, loop: Op) -> int | None:
    """Return the number of iterations of a while loop: as XLA notes it, or from the bound that its
    condition compares with; None if neither does.

    Loops that JAX makes count up by one, the compiler's own (products in windows) also by two; the
    bound is a constant of the condition or of the loop's first values.
    """
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(found[1])
    condition = program.computations[loop.called("condition")[0]]
    values = [
        _constant(program, computation, operand) for operand in _first_values(computation, loop)
    ]
    compared = _comparison(program, condition, values)
    if compared is None:
        return None
    direction, start, bound, counter = compared
    way = {
        "LT": bound - start,
        "LE": bound - start + 1,
        "NE": bound - start,
        "GT": start - bound,
        "GE": start - bound + 1,
    }
    stride = _stride(program, program.computations[loop.called("body")[0]], counter)
    # Rounded up: the last iteration may step beyond the bound.
    return max(0, -(-way[direction] // stride)) if direction in way else None


def _stride(program: Program, body: Computation, counter: int) -> int:
    """Return by how much an iteration moves the counter; 1 where the body does not show it."""
    if body.root.opcode != "tuple":
        return 1
    moved, of = body.by_name[body.root.operands[counter]], body
    if moved.opcode == "fusion":
        of = program.computations[moved.called("calls")[0]]
        moved = of.root
    steps = (
        [_constant(program, of, of.by_name[name]) for name in moved.operands]
        if moved.opcode in ("add", "subtract")
        else []
    )
    return next((abs(step) for step in steps if step), 1)


def _first_values(computation: Computation, loop: Op) -> Sequence[Op | None]:
    first = computation.by_name.get(loop.operands[0])
    if first is None or first.opcode != "tuple":
        return ()
    return [computation.by_name.get(name) for name in first.operands]


def _constant(program: Program, computation: Computation, op: Op | None) -> int | None:
    """Return the value of a constant whole number, through copies and bitcasts."""
    while op is not None and op.opcode in ("copy", "bitcast", "convert", "reshape"):
        op = computation.by_name.get(op.operands[0])
    if (
        op is None
        or op.opcode != "constant"
        or not re.fullmatch(r"-?\d+", op.argument.strip("{} "))
    ):
        return None
    return int(op.argument.strip("{} "))


def _comparison(
    program: Program, condition: Computation, values: Sequence[int | None]
) -> tuple[str, int, int, int] | None:
    """Return (direction, first value of the counter, bound, index of the counter among the loop's
    values) of the condition's root, which may be a fusion of the comparison."""
    root = condition.root
    known: dict[str, tuple[str, int | None, int] | None] = {}
    for op in condition.ops:
        if op.opcode == "constant":
            known[op.name] = ("bound", _constant(program, condition, op), -1)
        elif op.opcode == "get-tuple-element":
            index = int(op.attribute("index") or 0)
            known[op.name] = ("first", values[index] if index < len(values) else None, index)
        elif op.opcode in ("copy", "bitcast") and op.operands[0] in known:
            known[op.name] = known[op.operands[0]]
    if root.opcode == "fusion":
        inner = program.computations[root.called("calls")[0]]
        given = {
            p.name: known.get(name)
            for p, name in zip(inner.parameters(), root.operands, strict=True)
        }
        constants: dict[str, tuple[str, int | None, int] | None] = {
            op.name: ("bound", _constant(program, inner, op), -1)
            for op in inner.ops
            if op.opcode == "constant"
        }
        root, known = inner.root, given | constants
    if root.opcode != "compare":
        return None
    left, right = (known.get(name) for name in root.operands)
    if not left or not right or left[1] is None or right[1] is None or left[0] == "bound":
        return None
    return root.attribute("direction") or "", left[1], right[1], left[2]
