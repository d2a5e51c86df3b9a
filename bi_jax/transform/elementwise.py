"""Functions of single elements, so that an element's bits do not depend on where it is nor on the program around it.

XLA rewrites arithmetic by what it fuses, and it fuses by shape: it contracts a * b + c into one rounding, divides by way of a
reciprocal where the divisor is one number for all, gathers constant factors, and keeps bfloat16 intermediates in float32.
`pinned` puts each result out of reach of that, at the price of one integer operation and of no memory traffic.

On a CPU, XLA's exp, log, tanh and some others have two versions, for the bulk of an array and for what is left over, which
differ in the last bit; the contract's take their place there. A portable function has the contract's everywhere. Where XLA
computes what IEEE 754 says, sums, products and extremes on a GPU, the contract's is XLA's, pinned; on a CPU XLA flushes
subnormals, and the CPU engine's arithmetic takes its place.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.extend.core import Primitive

from bi_jax.engines import define, varying
from bi_jax.float64 import decode, encode, round_to, storage_bits
from bi_jax.narrow import narrow
from bi_jax.rows import primitive as rows
from bi_jax.rows.cpu_arithmetic import CpuArithmetic
from shared_specs.formats import FLOAT32, float_format
from shared_specs.programs import arithmetic, pointwise
from shared_specs.rows import RowProgram

Binary = Callable[[jax.Array, jax.Array], jax.Array]

OPERATIONS: dict[str, RowProgram] = {
    "add": arithmetic.ADD,
    "add_any": arithmetic.ADD,
    "div": pointwise.DIV,
    "max": arithmetic.MAXIMUM,
    "min": arithmetic.MINIMUM,
    "mul": arithmetic.MUL,
    "sqrt": pointwise.SQRT,
    "sub": arithmetic.SUB,
}
"""One IEEE operation each."""

FUNCTIONS: dict[str, RowProgram] = {
    "cos": pointwise.COS,
    "erf": pointwise.ERF,
    "erfc": pointwise.ERFC,
    "exp": pointwise.EXP,
    "exp2": pointwise.EXP2,
    "expm1": pointwise.EXPM1,
    "log": pointwise.LOG,
    "log1p": pointwise.LOG1P,
    "log2": pointwise.LOG2,
    "logistic": pointwise.SIGMOID,
    "pow": pointwise.POW,
    "rsqrt": pointwise.RSQRT,
    "sin": pointwise.SIN,
    "tanh": pointwise.TANH,
}

PROGRAMS = OPERATIONS | FUNCTIONS
"""What the contract has."""

STOCK: dict[str, Callable[..., jax.Array]] = {
    "add": lax.add,
    "add_any": lax.add,
    "cos": lax.cos,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "exp": lax.exp,
    "exp2": lax.exp2,
    "expm1": lax.expm1,
    "log": lax.log,
    "log1p": lax.log1p,
    "log2": lax.log2,
    "logistic": lax.logistic,
    "max": lax.max,
    "min": lax.min,
    "mul": lax.mul,
    "pow": lax.pow,
    "rsqrt": lax.rsqrt,
    "sin": lax.sin,
    "sub": lax.sub,
    "tanh": lax.tanh,
}

IEEE_ON_GPU = frozenset(["add", "add_any", "max", "min", "mul", "sub"])
"""XLA's, pinned, are the contract's."""

elementary_p = Primitive("bi_elementary")


def elementary(name: str, *operands: jax.Array, portable: bool = True) -> jax.Array:
    """One of `PROGRAMS` on arrays of one dtype that broadcast: the contract's, on a GPU only if `portable`, else XLA's own."""
    return elementary_p.bind(*varying(jnp.broadcast_arrays(*operands)), name=name, portable=portable)


def pinned(x: jax.Array) -> jax.Array:
    """x, as a value that no compiler combines with what computed it: the smaller of its pattern and the largest but one.

    Only the very largest pattern changes, which is one of NaN, and becomes another.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize not in (2, 4):
        return x
    bits = _bits(x)
    return lax.bitcast_convert_type(lax.min(bits, np.array(np.iinfo(bits.dtype).max - 1, bits.dtype)), x.dtype)


def pinned_div(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y. The divisor is made to depend on each x, lest XLA multiply by its reciprocal."""
    x, y = jnp.broadcast_arrays(x, y)
    return pinned(lax.div(x, lax.select(lax.ne(x, x), x, y)))


def _pinned(operation: Binary) -> Binary:
    return lambda x, y: pinned(operation(*jnp.broadcast_arrays(x, y)))


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Operations that round once, and what is made of them."""

    add: Binary
    sub: Binary
    mul: Binary
    div: Binary

    def square(self, x: jax.Array) -> jax.Array:
        """x * x."""
        return self.mul(x, x)

    def one_minus_square(self, x: jax.Array) -> jax.Array:
        """(1 + x) * (1 - x)."""
        one = jnp.ones_like(x)
        return self.mul(self.add(one, x), self.sub(one, x))

    def integer_pow(self, x: jax.Array, y: int) -> jax.Array:
        """x^y by squaring, the factors from the lowest bit of y upwards; the inverse of that for negative y."""
        left, power, result = abs(y), x, None
        while left:
            if left & 1:
                result = power if result is None else self.mul(result, power)
            left >>= 1
            power = self.mul(power, power) if left else power
        result = jnp.ones_like(x) if result is None else result
        return self.div(jnp.ones_like(x), result) if y < 0 else result


PINNED = Arithmetic(_pinned(lax.add), _pinned(lax.sub), _pinned(lax.mul), pinned_div)
EXACT = Arithmetic(*(partial(elementary, name) for name in ("add", "sub", "mul", "div")))


def convert(x: jax.Array, dtype: Any) -> jax.Array:
    """A float, integer or bool as `dtype`, which is floating, rounded to nearest even, by way of float32 if it is no float."""
    if x.dtype == dtype or jnp.dtype(dtype) == jnp.float32:
        return x.astype(dtype)
    return narrow(x.astype(jnp.float32), dtype)


def compare(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """eq, ne, lt, le, gt or ge by patterns: where it flushes subnormals, XLA finds them equal to zero."""
    x, y = jnp.broadcast_arrays(x, y)
    same = getattr(lax, name)(_ordered(x), _ordered(y))
    is_nan = lax.ne(x, x) | lax.ne(y, y)
    return lax.bitwise_or(same, is_nan) if name == "ne" else lax.bitwise_and(same, lax.bitwise_not(is_nan))


def sign(x: jax.Array) -> jax.Array:
    """1 or -1 with the sign of x; x where it is 0 or NaN."""
    one = lax.full_like(x, 1)
    nonzero = lax.bitwise_and(lax.ne(_ordered(x), np.int32(0)), lax.eq(x, x))
    return lax.select(nonzero, _with_bits(_bits(one) | _bits(x) & _sign_bit(x), x), x)


def neg(x: jax.Array) -> jax.Array:
    """The sign flipped, of a zero and of NaN too."""
    return _with_bits(_bits(x) ^ _sign_bit(x), x)


def absolute(x: jax.Array) -> jax.Array:
    """The sign cleared."""
    return _with_bits(_bits(x) & ~_sign_bit(x), x)


def integral(operation: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Floor, ceil or round: a subnormal, which XLA may take for 0, gives what the smallest normal number of its sign gives."""
    smallest = _with_bits(_bits(lax.full_like(x, jnp.finfo(x.dtype).smallest_normal)) | _bits(x) & _sign_bit(x), x)
    magnitude = lax.abs(_ordered(x))
    subnormal = lax.bitwise_and(lax.lt(magnitude, lax.abs(_ordered(smallest))), lax.ne(magnitude, np.int32(0)))
    return operation(lax.select(subnormal, smallest, x))


def by_program(program: RowProgram, *operands: jax.Array) -> jax.Array:
    """A program of elements on arrays of one shape and dtype."""
    x = operands[0]
    inputs = {name: value.reshape(1, x.size) for name, value in zip(program.elements, operands, strict=True)}
    return rows.run_rows(program, inputs, {}, {"y": x.dtype})["y"].reshape(x.shape)


@elementary_p.def_abstract_eval
def _abstract(x: Any, *_: Any, **__: Any) -> core.ShapedArray:
    return core.ShapedArray(x.shape, x.dtype, sharding=x.sharding, manual_axis_type=x.manual_axis_type)


def _on_cpu(*operands: jax.Array, name: str, portable: bool) -> jax.Array:
    return _one_operation(OPERATIONS[name], operands) if name in OPERATIONS else by_program(FUNCTIONS[name], *operands)


def _one_operation(program: RowProgram, operands: tuple[jax.Array, ...]) -> jax.Array:
    """As `by_program`, on the CPU, without its loop over blocks."""
    dtype, fmt = operands[0].dtype, float_format(operands[0].dtype.name)
    with jax.enable_x64(True):
        values = {name: decode(storage_bits(x), fmt) for name, x in zip(program.elements, operands, strict=True)}
        result = program.outputs["y"](CpuArithmetic(), SimpleNamespace(**values))
        return lax.bitcast_convert_type(encode(result if fmt is FLOAT32 else round_to(result, fmt), fmt), dtype)


def _on_cuda(*operands: jax.Array, name: str, portable: bool) -> jax.Array:
    if portable and name not in IEEE_ON_GPU:
        return by_program(PROGRAMS[name], *operands)
    return pinned(STOCK[name](*operands))


define(elementary_p, lambda name, **_: name, _on_cpu, _on_cuda)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)


def _with_bits(bits: jax.Array, like: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, like.dtype)


def _sign_bit(x: jax.Array) -> Any:
    return np.uint16(1 << 15) if x.dtype.itemsize == 2 else np.uint32(1 << 31)


def _ordered(x: jax.Array) -> jax.Array:
    """int32 in the order of the values of x; both zeros are 0. They are pinned: LLVM knows comparisons of patterns, too."""
    bits = _bits(pinned(x))
    magnitude = lax.convert_element_type(bits & ~_sign_bit(x), jnp.int32)
    return lax.select(lax.ge(bits, lax.full_like(bits, _sign_bit(x))), lax.neg(magnitude), magnitude)
