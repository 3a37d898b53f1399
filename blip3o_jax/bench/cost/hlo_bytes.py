"""Count the bytes that an HLO operation moves to and from a device's main memory (HBM).

Arrays in the core's own memory cost nothing. An operation that takes a slice of an array reads the
slice, also inside a fusion; one that updates a slice in place writes the slice: a loop over stacked
layers would otherwise pay for the whole stack in each iteration.
"""

from blip3o_jax.bench.cost.hlo import Computation, Op, Program, Shape, Shapes, element, leaves
from blip3o_jax.bench.cost.network import COLLECTIVES

SLICES = ("dynamic-slice", "slice", "gather")
# What belongs to a collective that overlaps the fusion's own work, and is counted as a
# collective.
PASSED_ON = (*COLLECTIVES, "tuple")
RENAMES = ("bitcast", "reshape", "get-tuple-element")


def operation_bytes(program: Program, computation: Computation, op: Op) -> int:
    """Return the bytes read and written by one operation of a scheduled computation."""
    if op.opcode == "fusion":
        return _fusion(program, computation, op)
    operands = [computation.by_name[name] for name in dict.fromkeys(op.operands)]
    if op.opcode in SLICES:
        return _bytes(op.shape) + (_bytes(op.shape) if _in_hbm(operands[0].shape) else 0)
    if op.opcode == "dynamic-update-slice":
        update = computation.by_name[op.operands[1]].shape
        return _bytes(update) + (_total(update) if _in_hbm(op.shape) else 0)
    if op.opcode == "scatter":
        updates = computation.by_name[op.operands[-1]].shape
        return _bytes(updates) + 2 * (_total(updates) if _in_hbm(op.shape) else 0)
    if op.opcode == "copy-start":  # the result is (target, source, flags)
        return _bytes(operands[0].shape) + _bytes(element(op.shape, 0))
    if op.opcode == "dynamic-update-slice-start":  # to the core's or the host's memory, in place
        return _total(computation.by_name[op.operands[1]].shape)
    if op.opcode.endswith(
        "-start"
    ):  # of a slice, between HBM and the core: ((operands), result, flags)
        return _total(element(op.shape, 1))
    return sum(_bytes(operand.shape) for operand in operands) + _bytes(op.shape)


def _bytes(shape: Shapes) -> int:
    return sum(leaf.bytes for leaf in leaves(shape) if leaf.space == 0)


def _total(shape: Shapes) -> int:
    return sum(leaf.bytes for leaf in leaves(shape))


def _in_hbm(shape: Shapes) -> bool:
    return all(leaf.space == 0 for leaf in leaves(shape))


def _fusion(program: Program, computation: Computation, op: Op) -> int:
    inner = program.computations[op.called("calls")[0]]
    total, seen = 0, set()
    for parameter, name in zip(inner.parameters(), op.operands, strict=True):
        shape = computation.by_name[name].shape
        if name not in seen and any(leaf.space == 0 for leaf in leaves(shape)):
            total += min(_bytes(shape), _read(program, inner, parameter.name))
            seen.add(name)
    outputs = list(leaves(op.shape))
    return total + sum(
        min(shape.bytes, _written(program, inner, root, shape))
        for shape, root in zip(outputs, _roots(inner, len(outputs)), strict=True)
        if shape.space == 0
    )


def _roots(computation: Computation, count: int) -> list[Op]:
    root = computation.root
    if root.opcode == "tuple":
        return [computation.by_name[name] for name in root.operands]
    return [root] * count


def _read(program: Program, computation: Computation, name: str) -> int:
    """Return the bytes that the computation reads of `name`."""
    total = 0
    for user in computation.users(name):
        if user.opcode in SLICES and user.operands[0] == name:
            total += _total(user.shape)
        elif user.opcode in PASSED_ON or (
            user.opcode == "dynamic-update-slice" and user.operands[0] == name
        ):
            continue
        elif user.opcode in RENAMES:
            total += _read(program, computation, user.name)
        elif user.opcode == "fusion":
            inner = program.computations[user.called("calls")[0]]
            uses = [
                p
                for p, operand in zip(inner.parameters(), user.operands, strict=True)
                if operand == name
            ]
            total += sum(_read(program, inner, p.name) for p in uses)
        else:
            return _total(computation.by_name[name].shape)
    return total


def _written(program: Program, computation: Computation, root: Op, shape: Shape) -> int:
    """Return the bytes written of an output."""
    while root.opcode in ("bitcast", "reshape", "copy"):
        root = computation.by_name[root.operands[0]]
    if root.opcode == "parameter" or root.opcode in COLLECTIVES:
        return 0
    if root.opcode == "dynamic-update-slice":
        return _total(computation.by_name[root.operands[1]].shape)
    if root.opcode == "fusion" and isinstance(root.shape, Shape):
        inner = program.computations[root.called("calls")[0]]
        return _written(program, inner, inner.root, shape)
    return shape.bytes
