"""Parse the text of a compiled program: scheduled HLO, as `compiled.as_text()` returns it.

Only the inputs of a cost are parsed: computations, operations in the order they run, shapes with
their memory space, and calls; trip_counts.py reads the iterations of loops, device_groups.py the
devices of collectives. The format is XLA's (openxla.org/xla/shapes, "layout"; hlo_instruction.cc
prints it).
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
VMEM, HOST = 1, 5  # memory spaces: of a TPU core, of its host; 0 is HBM


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Describe an array: "bf16", (16, 1152), memory space."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        if self.dtype in _BITS:
            return self.size * _BITS[self.dtype] // 8
        bits = re.findall(r"\d+", self.dtype)[0]  # bf16, f8e4m3fn, s4, u32
        return -(-self.size * int(bits) // 8)


Shapes = Shape | tuple["Shapes", ...]


def array(shape: Shapes) -> Shape:
    """Return the shape of a single array. ValueError for a tuple."""
    if isinstance(shape, Shape):
        return shape
    raise ValueError(f"expected an array, not the tuple {shape}")


def element(shape: Shapes, index: int) -> Shapes:
    """Return an element of a tuple. ValueError for a single array."""
    if isinstance(shape, Shape):
        raise ValueError(f"expected a tuple, not the array {shape}")
    return shape[index]


def leaves(shape: Shapes) -> Iterator[Shape]:
    """Return the arrays of a tuple, however deep."""
    if isinstance(shape, Shape):
        yield shape
    else:
        for inner in shape:
            yield from leaves(inner)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Op:
    """Hold one operation, `name = shape opcode(operands), attributes`; for constants and parameters
    `argument` is the text in the brackets."""

    name: str
    opcode: str
    shape: Shapes
    operands: tuple[str, ...]
    argument: str
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """Return the text of attribute `name` up to the comma or bracket that ends it:
        name=text."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        return _value(self.attributes, found.end()) if found else None

    def called(self, *names: str) -> tuple[str, ...]:
        """Return the computations under these attributes (`calls`, `body`, ...)."""
        texts = [self.attribute(name) for name in names]
        return tuple(
            word.lstrip("%") for text in texts if text for word in re.findall(r"%?[\w.\-]+", text)
        )

    @property
    def replica_groups(self) -> str:
        """Return the text of the attribute; in one of its forms it has commas."""
        found = re.search(r"replica_groups=(mesh\[[^{]*\{[^}]*\})", self.attributes)
        return found[1] if found else self.attribute("replica_groups") or "{}"

    @property
    def op_name(self) -> str:
        """Return where the operation comes from: named scopes with slashes between."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def estimated_cycles(self) -> int:
        """Return the TPU compiler's own estimate, or 0."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Computation:
    """Hold the operations of a computation in the order of the schedule."""

    name: str
    ops: tuple[Op, ...]
    by_name: dict[str, Op]

    @property
    def root(self) -> Op:
        return next((op for op in self.ops if op.root), self.ops[-1])

    def parameters(self) -> list[Op]:
        return sorted(
            (op for op in self.ops if op.opcode == "parameter"), key=lambda op: int(op.argument)
        )

    def users(self, name: str) -> list[Op]:
        return [op for op in self.ops if name in op.operands]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Program:
    """Hold the computations of a program and the name of its entry."""

    computations: dict[str, Computation]
    entry: str

    def operand(self, computation: Computation, op: Op, index: int) -> Op:
        return computation.by_name[op.operands[index]]


def parse(text: str) -> Program:
    """Parse a program. Raises ValueError where the text holds no entry computation."""
    computations: dict[str, Computation] = {}
    entry: str | None = None
    name: str | None = None
    ops: list[Op] = []
    for line in text.splitlines():
        if name is None:
            if line.endswith("{") and (
                header := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(|\{)", line)
            ):
                name, ops = header[2], []
                entry = name if header[1] else entry
        elif line == "}":
            computations[name] = Computation(name, tuple(ops), {op.name: op for op in ops})
            name = None
        elif (op := _op(line)) is not None:
            ops.append(op)
        elif ops:  # what a kernel says of itself may have line breaks in it
            ops[-1] = dataclasses.replace(ops[-1], attributes=f"{ops[-1].attributes} {line}")
    if entry is None:
        raise ValueError("no HLO: the text has no ENTRY computation")
    return Program(computations, entry)


_START = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([\w\-]+)\(")


def _op(line: str) -> Op | None:
    start = _START.match(line)
    if not start:
        return None
    shape, at = _shape(line, start.end())
    opcode = _OPCODE.match(line, at)
    if not opcode:
        raise ValueError(f"not an HLO operation: {line[:200]!r}")
    end = _closing(line, opcode.end() - 1)
    argument = line[opcode.end() : end]
    operands = (
        ()
        if opcode[1] in ("constant", "parameter", "iota")
        else tuple(map(_operand, _split(argument)))
    )
    return Op(
        start[2], opcode[1], shape, operands, argument, line[end + 1 :].lstrip(", "), bool(start[1])
    )


def _operand(text: str) -> str:
    """Parse an operand; older texts put the shape before the name."""
    return text.rsplit(" ", 1)[-1].lstrip("%")


_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
_LAYOUT = re.compile(r"\{[^}]*\}")


_COMMENT = re.compile(r"\s*(/\*.*?\*/)?\s*")


def _after_comment(text: str, at: int) -> int:
    """Return the position after spaces and a comment, if there are any, at `at`."""
    found = _COMMENT.match(text, at)
    return found.end() if found else at


def _shape(text: str, at: int) -> tuple[Shapes, int]:
    """Return (shape, where it ends) of the shape at `at`."""
    if text[at] == "(":
        parts = []
        at = _after_comment(text, at + 1)
        while text[at] != ")":
            part, at = _shape(text, at)
            parts.append(part)
            at = _after_comment(text, at + (text[at] == ","))
        return tuple(parts), at + 1
    array = _ARRAY.match(text, at)
    if not array:
        raise ValueError(f"not an HLO shape: {text[at : at + 80]!r}")
    at, space = array.end(), 0
    if layout := _LAYOUT.match(text, at):
        at = layout.end()
        found = re.search(r"S\((\d+)\)", layout[0])
        space = int(found[1]) if found else 0
    # "<=" marks a bounded dynamic dimension.
    dims = tuple(int(d.strip().removeprefix("<=")) for d in array[2].split(",") if d.strip())
    return Shape(array[1], dims, space), at


_OPEN, _CLOSE = "([{", ")]}"


def _closing(text: str, at: int) -> int:
    """Return the index of the bracket that closes the one at `at`."""
    depth, quoted = 0, False
    for i in range(at, len(text)):
        c = text[i]
        if c == '"':
            quoted = not quoted
        elif not quoted and c in _OPEN:
            depth += 1
        elif not quoted and c in _CLOSE:
            depth -= 1
            if depth == 0:
                return i
    raise ValueError(f"unbalanced brackets: {text[at : at + 120]!r}")


def _split(text: str) -> list[str]:
    """Cut at the commas outside of brackets."""
    if not any(c in text for c in "([{"):
        parts = text.split(",")
    else:
        parts = []
        depth = 0
        start = 0
        for i, c in enumerate(text):
            depth += (c in _OPEN) - (c in _CLOSE)
            if c == "," and depth == 0:
                parts.append(text[start:i])
                start = i + 1
        parts.append(text[start:])
    return [clean for part in parts if (clean := re.sub(r"/\*.*?\*/", "", part).strip())]


def _value(text: str, at: int) -> str:
    """Return an attribute's value: everything up to the comma outside of brackets."""
    depth, quoted = 0, False
    for i in range(at, len(text)):
        c = text[i]
        if c == '"':
            quoted = not quoted
        elif not quoted:
            depth += (c in _OPEN) - (c in _CLOSE)
            if c == "," and depth == 0:
                return text[at:i]
    return text[at:]
