"""`shared_specs.arithmetic.Arithmetic` in XLA computations for a CPU: float64 values that hold float32 ones, int32 and bool.

The result of every operation is rounded by integer operations (`bi_jax.float64`). 53 bits are enough (2 * 24 + 2) for
rounding a float32 sum, product, quotient or square root twice to be harmless, also where the result is subnormal.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bi_jax.float64 import decode, encode, round32, round_to, round_to_odd, snap
from shared_specs.arithmetic import Value
from shared_specs.formats import FLOAT32, float_format


def _floats(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Traced once for all calls with the same shapes; a Python number among the operands is a float."""
    jitted = jax.jit(function)

    @functools.wraps(function)
    def operation(self: "CpuArithmetic", *operands: Value) -> Value:
        return jitted(*_apart([np.float64(x) if isinstance(x, int | float) else x for x in operands]))

    return operation


def _apart(operands: list[Value]) -> list[Value]:
    """What is computed once a row or a column is not to be computed again for each element that it is broadcast to."""
    shape = np.broadcast_shapes(*(np.shape(x) for x in operands))
    return [lax.optimization_barrier(x) if isinstance(x, jax.Array) and x.shape != shape else x for x in operands]


def _ints(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A Python number among the operands is an int32."""

    @functools.wraps(function)
    def operation(self: "CpuArithmetic", *operands: Value) -> Value:
        return function(*(jnp.int32(i) if isinstance(i, int) else i for i in operands))

    return operation


def _fma(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """The product is exact in float64; the sum is rounded to odd there, as in the reference model."""
    product = x * y
    total = product + z
    rest = total - product  # Knuth's TwoSum
    error = (product - (total - rest)) + (z - rest)
    return round32(round_to_odd(total, error))


def _max(x: jax.Array, y: jax.Array) -> jax.Array:
    larger = jnp.where((x > y) | jnp.isnan(x), x, y)
    return jnp.where(x == y, _float(_bits(x) & _bits(y)), larger)


def _min(x: jax.Array, y: jax.Array) -> jax.Array:
    smaller = jnp.where((x < y) | jnp.isnan(x), x, y)
    return jnp.where(x == y, _float(_bits(x) | _bits(y)), smaller)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint64)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float64)


class CpuArithmetic:
    """The operations, for use under `jax.enable_x64`."""

    add = _floats(lambda x, y: round32(x + y))
    sub = _floats(lambda x, y: round32(x - y))
    mul = _floats(lambda x, y: round32(x * y))
    # XLA divides by a scalar by way of its reciprocal: the last two bits of the quotient are not to be trusted. No
    # quotient of two float32 numbers is so close to the middle between two others, unless it is the middle.
    div = _floats(lambda x, y: round32(snap(x / y)))
    sqrt = _floats(lambda x: round32(jnp.sqrt(x)))
    fma = _floats(_fma)
    neg = _floats(lambda x: _float(_bits(x) ^ np.uint64(1 << 63)))
    abs = _floats(lambda x: _float(_bits(x) & np.uint64((1 << 63) - 1)))
    max = _floats(_max)
    min = _floats(_min)

    def narrow(self, x: Value, dtype: str) -> Value:
        return round_to(x, float_format(dtype))

    less = _floats(lambda x, y: x < y)
    equal = _floats(lambda x, y: x == y)
    is_nan = _floats(lambda x: jnp.isnan(x))

    def both(self, p: Value, q: Value) -> Value:
        return p & q

    def either(self, p: Value, q: Value) -> Value:
        return p | q

    def select(self, p: Value, x: Value, y: Value) -> Value:
        x, y = (np.float64(v) if isinstance(v, float) else np.int32(v) if isinstance(v, int) else v for v in (x, y))
        if x.dtype != y.dtype:
            raise TypeError(f"select takes two floats or two integers, got {x.dtype} and {y.dtype}")
        return jnp.where(*_apart([p, x, y]))

    int_add = _ints(lambda i, j: i + j)
    int_sub = _ints(lambda i, j: i - j)
    int_mul = _ints(lambda i, j: i * j)
    int_and = _ints(lambda i, j: i & j)
    int_or = _ints(lambda i, j: i | j)
    int_xor = _ints(lambda i, j: i ^ j)
    shift_left = _ints(lambda i, count: i << count)
    shift_right = _ints(lambda i, count: i >> count)
    shift_right_logical = _ints(lambda i, count: (i.astype(jnp.uint32) >> count.astype(jnp.uint32)).astype(jnp.int32))
    mul_high = _ints(lambda i, j: ((_unsigned(i) * _unsigned(j)) >> 32).astype(jnp.uint32).astype(jnp.int32))
    int_less = _ints(lambda i, j: i < j)
    int_equal = _ints(lambda i, j: i == j)

    bits = _floats(lambda x: encode(x, FLOAT32).astype(jnp.int32))
    from_bits = _ints(lambda i: decode(i.astype(jnp.uint32), FLOAT32))
    to_int = _floats(lambda x: x.astype(jnp.int32))
    to_float = _ints(lambda i: round32(i.astype(jnp.float64)))


def _unsigned(i: jax.Array) -> jax.Array:
    return i.astype(jnp.uint32).astype(jnp.uint64)
