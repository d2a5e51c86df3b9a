"""`shared_specs.arithmetic.Arithmetic` over the values of a Triton kernel, and the door through which a kernel calls formulas.

A formula of a row program is a Python function. The builtins below call it while a kernel is compiled, so the operations that
it asks for are emitted one by one, as NumPy computes them one by one: IEEE instructions, none contracted as long as the
kernel is compiled with `enable_fp_fusion=False`.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton import constexpr_function
from triton.language.core import builtin

from shared_specs import scalar, sum_exp
from shared_specs.rows import ColumnProgram, RowProgram
from shared_specs.trace import contract_id, element_reduced, outputs_read_elements, terms_read

_NARROW = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}
_SIGN = -(2**31)
_NAN = 0x7FFFFFFF
_SOURCES = (__file__, scalar.__file__, sum_exp.__file__)
_LOWERING = hashlib.sha256(b"".join(Path(source).read_bytes() for source in _SOURCES)).hexdigest()


@dataclass(frozen=True)
class Formulas:
    """A program as a compile-time argument. Triton's caches know a kernel by the text of its arguments, so that names the
    program's operations and the way in which this module emits them, those of `sum_exp.near_term` among them.
    """

    program: RowProgram | ColumnProgram

    def __repr__(self) -> str:
        return f"{contract_id(self.program)}-{_LOWERING}"

    def reads_terms(self, index: int) -> bool:
        """Whether outputs read the terms of reduction `index`."""
        assert isinstance(self.program, RowProgram)
        return self.program.reductions[index] in terms_read(self.program)

    def element_of(self, index: int) -> int:
        """The position of the element that reduction `index` is over as it is, or -1."""
        assert isinstance(self.program, RowProgram)
        name = element_reduced(self.program, index)
        return -1 if name is None else self.program.elements.index(name)

    def reads_elements(self) -> bool:
        """Whether outputs read elements."""
        return outputs_read_elements(self.program)


@constexpr_function
def reduction_count(formulas):
    """Reductions of the program."""
    return len(formulas.program.reductions)


@constexpr_function
def kind_of(formulas, index):
    """The kind of a reduction."""
    return formulas.program.reductions[index].kind


@constexpr_function
def element_of(formulas, index):
    """The position of the element that a reduction is over as it is, or -1."""
    return formulas.element_of(index)


@constexpr_function
def reads_terms(formulas, index):
    """Whether outputs read the terms of a reduction."""
    return formulas.reads_terms(index)


@constexpr_function
def reads_elements(formulas):
    """Whether outputs read elements."""
    return formulas.reads_elements()


@constexpr_function
def last_reading_stage(formulas):
    """The last of the stages, one for each reduction and one for the outputs, that reads elements."""
    return len(formulas.program.reductions) - (not formulas.program.outputs)


class TritonArithmetic:
    """The operations as Triton emits them; `semantic` is what Triton hands to a builtin."""

    def __init__(self, semantic: Any) -> None:
        self._semantic = semantic
        self._rounded: list[Any] = []

    def canonical(self, x: Any) -> Any:
        """x with the one NaN that is stored. The instructions that round give no other; a conversion to 16 bits keeps it."""
        x = self._float(x)
        if any(x is value for value in self._rounded):
            return x
        return self.select(self.is_nan(x), self.from_bits(_NAN), x)

    def _result(self, x: Any) -> Any:
        """Remember x as the result of an instruction that rounds."""
        self._rounded.append(x)
        return x

    def _float(self, x: Any) -> Any:
        """A Python number as float32, anything else as it is."""
        return self._semantic.scalar_constant(float(x), tl.float32) if isinstance(x, (int, float)) else x

    def _int(self, i: Any) -> Any:
        return self._semantic.scalar_constant(i, tl.int32) if isinstance(i, int) else i

    def add(self, x: Any, y: Any) -> Any:
        return self._result(self._semantic.add(self._float(x), self._float(y), False))

    def sub(self, x: Any, y: Any) -> Any:
        return self._result(self._semantic.sub(self._float(x), self._float(y), False))

    def mul(self, x: Any, y: Any) -> Any:
        return self._result(self._semantic.mul(self._float(x), self._float(y), False))

    def div(self, x: Any, y: Any) -> Any:
        return self._result(tl.math.div_rn(self._float(x), self._float(y), _semantic=self._semantic))

    def sqrt(self, x: Any) -> Any:
        return self._result(tl.math.sqrt_rn(self._float(x), _semantic=self._semantic))

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self._result(tl.math.fma(self._float(x), self._float(y), self._float(z), _semantic=self._semantic))

    def neg(self, x: Any) -> Any:
        return self.from_bits(self.int_xor(self.bits(x), _SIGN))  # Triton's own -x is 0 - x

    def abs(self, x: Any) -> Any:
        return tl.math.abs(self._float(x), _semantic=self._semantic)

    def max(self, x: Any, y: Any) -> Any:
        """`max.NaN.f32`, which orders zeros."""
        return self._semantic.maximum(self._float(x), self._float(y), tl.PropagateNan.ALL)

    def min(self, x: Any, y: Any) -> Any:
        return self._semantic.minimum(self._float(x), self._float(y), tl.PropagateNan.ALL)

    def narrow(self, x: Any, dtype: str) -> Any:
        return self._semantic.cast(self._semantic.cast(self._float(x), _NARROW[dtype]), tl.float32)

    def less(self, x: Any, y: Any) -> Any:
        return self._semantic.less_than(self._float(x), self._float(y))

    def equal(self, x: Any, y: Any) -> Any:
        return self._semantic.equal(self._float(x), self._float(y))

    def is_nan(self, x: Any) -> Any:
        return self._semantic.not_equal(self._float(x), self._float(x))

    def both(self, p: Any, q: Any) -> Any:
        return self._semantic.and_(p, q)

    def either(self, p: Any, q: Any) -> Any:
        return self._semantic.or_(p, q)

    def select(self, p: Any, x: Any, y: Any) -> Any:
        x, y = (self._float(v) if isinstance(v, float) else self._int(v) for v in (x, y))
        if x.dtype != y.dtype:
            raise TypeError(f"select takes two floats or two integers, got {x.dtype} and {y.dtype}")
        return self._semantic.where(p, x, y)

    def int_add(self, i: Any, j: Any) -> Any:
        return self._semantic.add(self._int(i), self._int(j), False)

    def int_sub(self, i: Any, j: Any) -> Any:
        return self._semantic.sub(self._int(i), self._int(j), False)

    def int_mul(self, i: Any, j: Any) -> Any:
        return self._semantic.mul(self._int(i), self._int(j), False)

    def mul_high(self, i: Any, j: Any) -> Any:
        unsigned = (self._semantic.bitcast(self._int(v), tl.uint32) for v in (i, j))
        return self._semantic.bitcast(tl.math.umulhi(*unsigned, _semantic=self._semantic), tl.int32)

    def int_and(self, i: Any, j: Any) -> Any:
        return self._semantic.and_(self._int(i), self._int(j))

    def int_or(self, i: Any, j: Any) -> Any:
        return self._semantic.or_(self._int(i), self._int(j))

    def int_xor(self, i: Any, j: Any) -> Any:
        return self._semantic.xor_(self._int(i), self._int(j))

    def shift_left(self, i: Any, count: Any) -> Any:
        return self._semantic.shl(self._int(i), self._int(count))

    def shift_right(self, i: Any, count: Any) -> Any:
        return self._semantic.ashr(self._int(i), self._int(count))

    def shift_right_logical(self, i: Any, count: Any) -> Any:
        unsigned = (self._semantic.bitcast(self._int(v), tl.uint32) for v in (i, count))
        return self._semantic.bitcast(self._semantic.lshr(*unsigned), tl.int32)

    def int_less(self, i: Any, j: Any) -> Any:
        return self._semantic.less_than(self._int(i), self._int(j))

    def int_equal(self, i: Any, j: Any) -> Any:
        return self._semantic.equal(self._int(i), self._int(j))

    def bits(self, x: Any) -> Any:
        return self._semantic.bitcast(self._float(x), tl.int32)

    def from_bits(self, i: Any) -> Any:
        return self._semantic.bitcast(self._int(i), tl.float32)

    def to_int(self, x: Any) -> Any:
        return self._semantic.cast(self._float(x), tl.int32)

    def to_float(self, i: Any) -> Any:
        return self._semantic.cast(self._int(i), tl.float32)


@builtin
def evaluate(formulas, group, index, values, row_values, reduced, column, shape, _semantic=None):
    """Formula number `index` of "reductions", "outputs", "row_outputs" or "sums", broadcast to `shape`.

    Outputs have the one NaN that is stored; "factors" are outputs that a product takes, to which every NaN is the same.

    Args:
        formulas: `Formulas`.
        group, index: which formula.
        values: elements and columns, in the program's order.
        row_values: rows, ids, scalars, integers, gathered and the count.
        reduced: states of the reductions so far; for outputs, that of a sum of exponentials goes on with term and weight.
        column: the element's index in its row, int32.
        shape: shape of the result.
    """
    program = formulas.value.program if isinstance(formulas, tl.constexpr) else formulas.program
    group, index = (v.value if isinstance(v, tl.constexpr) else v for v in (group, index))
    e = SimpleNamespace(column=column)
    for names, given in ((cell_names(program), values), (row_names(program), row_values)):
        for name, value in zip(names, given, strict=False):
            setattr(e, name, value.value if isinstance(value, tl.constexpr) else value)
    reductions = getattr(program, "reductions", ())
    for reduction, state in zip(reductions, reduced, strict=False):
        numbers = [value.value if isinstance(value, tl.constexpr) else value for value in state]
        setattr(e, reduction.name, sum_exp.SumExp(*numbers) if reduction.kind == "sum_exp" else numbers[0])
    of = "outputs" if group == "factors" else group
    formula = reductions[index].of if group == "reductions" else list(getattr(program, of).values())[index]
    f = TritonArithmetic(_semantic)
    shape = [int(extent.value) if isinstance(extent, tl.constexpr) else int(extent) for extent in shape]
    value = formula(f, e)
    value = f.canonical(value) if group.endswith("outputs") else f._float(value)
    return _semantic.broadcast_impl_shape(value, shape) if shape else value


def cell_names(program):
    """What a formula reads one value of for every element."""
    return (*program.elements, *program.columns)


def row_names(program):
    """What it reads one value of for every row."""
    if isinstance(program, ColumnProgram):
        return (*program.rows, *program.scalars)
    return (*program.rows, *program.ids, *program.scalars, *program.integers, *program.gathered, "count")


@builtin
def larger(x, y, _semantic=None):
    """`Arithmetic.max`."""
    return TritonArithmetic(_semantic).max(x, y)


@builtin
def smaller(x, y, _semantic=None):
    """`Arithmetic.min`."""
    return TritonArithmetic(_semantic).min(x, y)


@builtin
def exp_term(x, segment_max, _semantic=None):
    """`sum_exp.term`."""
    return sum_exp.term(TritonArithmetic(_semantic), x, segment_max)


@builtin
def near_exp_term(x, segment_max, _semantic=None):
    """`sum_exp.near_term`."""
    return sum_exp.near_term(TritonArithmetic(_semantic), x, segment_max)


@builtin
def near(x, segment_max, _semantic=None):
    """`sum_exp.near`."""
    return sum_exp.near(TritonArithmetic(_semantic), x, segment_max)


@builtin
def rescaled(segment_max, segment_sum, row_max, _semantic=None):
    """`sum_exp.rescaled`."""
    return sum_exp.rescaled(TritonArithmetic(_semantic), sum_exp.SumExp(segment_max, segment_sum), row_max)


@builtin
def weight(segment_max, row_max, _semantic=None):
    """`sum_exp.weight`."""
    return sum_exp.weight(TritonArithmetic(_semantic), segment_max, row_max)


@builtin
def canonical(x, _semantic=None):
    """x with the one NaN that is stored."""
    return TritonArithmetic(_semantic).canonical(x)
