"""Count how often a loop takes each branch of a conditional whose predicate is an array made before
the loop, as for the layers of a stack that are skipped."""

import re

import numpy as np

from blip3o_jax.bench.cost.hlo import Computation, Op, Program

_SAME = ("bitcast", "reshape", "convert", "copy", "copy-done", "copy-start")
_COMPARE = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}


def fractions(program: Program, computation: Computation, op: Op) -> list[float] | None:
    """Return the fraction of iterations that take each branch of the conditional `op`, in the order
    of its attributes, in the loop whose body is `computation`; None where the program's text does
    not state it.
    """
    chosen = _through(computation, computation.by_name[op.operands[0]], (*_SAME, "dynamic-slice"))
    if (
        chosen.opcode != "get-tuple-element"
        or computation.by_name[chosen.operands[0]].opcode != "parameter"
    ):
        return None
    loops = ((c, w) for c in program.computations.values() for w in c.ops if w.opcode == "while")
    found = next(((c, w) for c, w in loops if computation.name in w.called("body")), None)
    if found is None:
        return None
    outer, loop = found
    first = outer.by_name[loop.operands[0]]
    if first.opcode != "tuple":
        return None
    index = int(chosen.attribute("index") or 0)
    values = _value(program, outer, outer.by_name[first.operands[index]])
    if values is None or not values.size:
        return None
    if listed := op.called("branch_computations"):
        return [float(np.mean(values == i)) for i in range(len(listed))]
    taken = float(np.mean(values != 0))  # true_computation, false_computation
    return [taken, 1 - taken]


def _through(computation: Computation, op: Op, opcodes: tuple[str, ...]) -> Op:
    while op.opcode in opcodes:
        op = computation.by_name[op.operands[0]]
    return op


def _value(program: Program, computation: Computation, op: Op) -> np.ndarray | None:
    op = _through(computation, op, _SAME)
    dims = getattr(op.shape, "dims", ())
    if op.opcode == "constant":
        words = {"true": "1", "false": "0"}
        numbers = [
            int(words.get(word, word)) for word in re.findall(r"true|false|-?\d+", op.argument)
        ]
        return np.array(numbers).reshape(dims) if len(numbers) == np.prod(dims, dtype=int) else None
    if op.opcode == "iota":
        along = [
            -1 if i == int(op.attribute("iota_dimension") or 0) else 1 for i in range(len(dims))
        ]
        return np.broadcast_to(np.arange(dims[along.index(-1)]).reshape(along), dims)
    if op.opcode == "fusion" and not op.operands:
        inner = program.computations[op.called("calls")[0]]
        return _value(program, inner, inner.root)
    found = [_value(program, computation, computation.by_name[name]) for name in op.operands]
    inputs = [x for x in found if x is not None]
    if not inputs or len(inputs) != len(found):
        return None
    if op.opcode == "broadcast" and inputs[0].ndim == 0:
        return np.broadcast_to(inputs[0], dims)
    if op.opcode == "compare":
        left, right = inputs
        return _COMPARE[op.attribute("direction") or ""](left, right)
    return None
