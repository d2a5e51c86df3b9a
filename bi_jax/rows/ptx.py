"""`shared_specs.arithmetic.Arithmetic` as PTX: formulas become listings of operations, and listings straight-line code.

Inline PTX is final: every operation is one instruction with its own rounding, which no compiler contracts, reassociates or
flushes. A formula is one piece of text, so its size costs little at compile time.

An operation stands at the level of its operands: of the call (scalars), of a row (reductions), of a segment of it or of an
element. What is of a row is computed once a row, however often the elements read it; likewise what is of a segment.
"""

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from shared_specs.formats import FLOAT32_NAN

Kind = Literal["float", "int", "bool"]


class Level(IntEnum):
    """What a value is the same for."""

    CALL = 0
    ROW = 1
    SEGMENT = 2
    ELEMENT = 3


@dataclass(frozen=True, eq=False)
class Node:
    """An operation, or an input if it has no operands. Nodes of one `Listing` are equal only if identical.

    Attributes:
        index: place in the listing, after those of the operands.
        operation: name of an operation of `Arithmetic`, or of an input.
        operands: nodes and constants.
        kind: of the result.
        level: of the result.
    """

    index: int
    operation: str
    operands: tuple["Node | float | int | str", ...]
    kind: Kind
    level: Level

    @property
    def is_input(self) -> bool:
        return not self.operands


_TEMPLATES: dict[str, tuple[Kind, str]] = {
    "add": ("float", "add.rn.f32 {0}, {1}, {2};"),
    "sub": ("float", "sub.rn.f32 {0}, {1}, {2};"),
    "mul": ("float", "mul.rn.f32 {0}, {1}, {2};"),
    "div": ("float", "div.rn.f32 {0}, {1}, {2};"),
    "sqrt": ("float", "sqrt.rn.f32 {0}, {1};"),
    "fma": ("float", "fma.rn.f32 {0}, {1}, {2}, {3};"),
    "neg": ("float", "neg.f32 {0}, {1};"),
    "abs": ("float", "abs.f32 {0}, {1};"),
    "max": ("float", "max.NaN.f32 {0}, {1}, {2};"),
    "min": ("float", "min.NaN.f32 {0}, {1}, {2};"),
    "less": ("bool", "setp.lt.f32 {0}, {1}, {2};"),
    "equal": ("bool", "setp.eq.f32 {0}, {1}, {2};"),
    "is_nan": ("bool", "setp.nan.f32 {0}, {1}, {1};"),
    "both": ("bool", "and.pred {0}, {1}, {2};"),
    "either": ("bool", "or.pred {0}, {1}, {2};"),
    "int_add": ("int", "add.s32 {0}, {1}, {2};"),
    "int_sub": ("int", "sub.s32 {0}, {1}, {2};"),
    "int_mul": ("int", "mul.lo.s32 {0}, {1}, {2};"),
    "mul_high": ("int", "mul.hi.u32 {0}, {1}, {2};"),
    "int_and": ("int", "and.b32 {0}, {1}, {2};"),
    "int_or": ("int", "or.b32 {0}, {1}, {2};"),
    "int_xor": ("int", "xor.b32 {0}, {1}, {2};"),
    "shift_left": ("int", "shl.b32 {0}, {1}, {2};"),
    "shift_right": ("int", "shr.s32 {0}, {1}, {2};"),
    "shift_right_logical": ("int", "shr.u32 {0}, {1}, {2};"),
    "int_less": ("bool", "setp.lt.s32 {0}, {1}, {2};"),
    "int_equal": ("bool", "setp.eq.s32 {0}, {1}, {2};"),
    "bits": ("int", "mov.b32 {0}, {1};"),
    "from_bits": ("float", "mov.b32 {0}, {1};"),
    "to_int": ("int", "cvt.rzi.s32.f32 {0}, {1};"),
    "to_float": ("float", "cvt.rn.f32.s32 {0}, {1};"),
}
"""Kind of the result and instruction of each operation; `select` and `narrow` depend on their operands."""

_NARROW = {  # to the upper half of a float32, beside a zero
    "bfloat16": "{{ .reg .b32 r; cvt.rn.bf16x2.f32 r, {1}, 0f00000000; mov.b32 {0}, r; }}",
    "float16": "{{ .reg .b16 h; cvt.rn.f16.f32 h, {1}; cvt.f32.f16 {0}, h; }}",
}
_INTEGER_OPERANDS = {"from_bits", "to_float", "int_less", "int_equal"}
_REGISTERS: dict[Kind, tuple[str, str]] = {"float": ("f", ".f32"), "int": ("i", ".b32"), "bool": ("p", ".pred")}


class Listing:
    """An `Arithmetic` that writes operations down, each once."""

    def __init__(self) -> None:
        self._nodes: dict[tuple, Node] = {}

    def __getattr__(self, operation: str) -> Callable[..., Node]:
        if operation not in _TEMPLATES:
            raise AttributeError(operation)
        return lambda *operands: self._node(operation, operands, _TEMPLATES[operation][0])

    def input(self, name: str, level: Level, kind: Kind = "float") -> Node:
        """The input called `name`."""
        return self._nodes.setdefault((name,), Node(len(self._nodes), name, (), kind, level))

    def narrow(self, x: Node | float, dtype: str) -> Node | float:
        return x if dtype == "float32" else self._node("narrow", (x, dtype), "float")

    def select(self, p: Node, x: Node | float | int, y: Node | float | int) -> Node:
        return self._node("select", (p, x, y), _kind(x))

    def canonical(self, x: Node | float) -> Node:
        """x with the one pattern of a NaN that float32 outputs store; constants have it too."""
        return self.select(self.is_nan(x), math.nan, x)

    def _node(self, operation: str, operands: tuple, kind: Kind) -> Node:
        key = operation, *(x if isinstance(x, Node) else (type(x), repr(x)) for x in operands)
        level = max((x.level for x in operands if isinstance(x, Node)), default=Level.CALL)
        return self._nodes.setdefault(key, Node(len(self._nodes), operation, operands, kind, level))


def needed(roots: Iterable[Node], stop: Callable[[Node], bool]) -> tuple[list[Node], list[Node]]:
    """The operations that `roots` consist of, down to those nodes where `stop` holds; and the latter. Both in order."""
    body, leaves, pending = set(), set(), list(roots)
    while pending:
        node = pending.pop()
        if node in body or node in leaves:
            continue
        if stop(node):
            leaves.add(node)
        else:
            assert not node.is_input, node.operation
            body.add(node)
            pending += [x for x in node.operands if isinstance(x, Node)]
    return sorted(body, key=lambda x: x.index), sorted(leaves, key=lambda x: x.index)


@dataclass(frozen=True)
class Block:
    """Straight-line code from `inputs` to `outputs`, which are no predicates."""

    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @property
    def operations(self) -> list[Node]:
        """What is computed, in order."""
        inputs = set(self.inputs)
        return needed(self.outputs, lambda node: node in inputs)[0]

    def text(self) -> str:
        """PTX for `llvm.inline_asm`: $0, $1, ... are the outputs, then the inputs."""
        names = {node: f"${len(self.outputs) + i}" for i, node in enumerate(self.inputs)}
        lines, counts = [], dict.fromkeys(_REGISTERS, 0)
        for node in self.operations:
            operands = [_operand(node, x, names) for x in node.operands if x not in _NARROW]
            names[node] = f"{_REGISTERS[node.kind][0]}{counts[node.kind]}"
            counts[node.kind] += 1
            lines.append(_template(node).format(names[node], *operands))
        declared = [f".reg {_REGISTERS[kind][1]} {_REGISTERS[kind][0]}<{n}>;" for kind, n in counts.items() if n]
        moves = [f"mov.b32 ${i}, {names[node]};" for i, node in enumerate(self.outputs)]
        return "\n".join(["{", *declared, *lines, *moves, "}"])

    def constraints(self) -> str:
        """The operands' registers for `llvm.inline_asm`. An output may be written before the last input is read."""
        outputs = [f"=&{_constraint(node)}" for node in self.outputs]
        return ",".join(outputs + [_constraint(node) for node in self.inputs])


def adjacent_pairs(combine: Callable[[Any, Any], Any], values: Sequence[Any]) -> Any:
    """`combine` over adjacent pairs, repeated until one is left."""
    while len(values) > 1:
        values = [combine(values[i], values[i + 1]) for i in range(0, len(values), 2)]
    return values[0]


def _kind(x: Node | float | int) -> Kind:
    if isinstance(x, Node):
        return x.kind
    return "float" if isinstance(x, float) else "int"


def _template(node: Node) -> str:
    if node.operation == "narrow":
        return _NARROW[str(node.operands[1])]
    if node.operation == "select":
        return f"selp.{'f32' if node.kind == 'float' else 'b32'} {{0}}, {{2}}, {{3}}, {{1}};"
    return _TEMPLATES[node.operation][1]


def _operand(node: Node, x: Node | float | int | str, names: dict[Node, str]) -> str:
    if isinstance(x, Node):
        return names[x]
    assert not isinstance(x, str), x
    if isinstance(x, int) and (node.kind == "int" or node.operation in _INTEGER_OPERANDS):
        return str(x)
    pattern = FLOAT32_NAN if math.isnan(x) else struct.unpack("I", struct.pack("f", x))[0]
    return f"0f{pattern:08X}"


def _constraint(node: Node) -> str:
    assert node.kind != "bool", node.operation
    return "f" if node.kind == "float" else "r"
