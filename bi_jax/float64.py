"""float32 and 16-bit floats as float64 values inside XLA computations for a CPU, where float32 arithmetic is not IEEE's.

XLA on a CPU flushes float32 subnormals, on conversion to float64 too, contracts products with sums and rewrites chains of
constants. None of that reaches the bits here. Values are float64 and hold exactly what a narrower format holds, so no
operand is subnormal; patterns are decoded and encoded by integer operations; and every rounding passes through integers,
so XLA never sees two float64 operations in a row that it could combine. For use under `jax.enable_x64`. These functions are
traced hundreds of times for one operation, so they use `jax.lax`, which traces three times as fast as `jax.numpy`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from shared_specs.formats import FLOAT32, FloatFormat

BIAS, MANTISSA = 1023, 52
SIGN = np.uint64(1 << 63)
EXPONENT = np.uint64(0x7FF << MANTISSA)


def storage_bits(x: jax.Array) -> jax.Array:
    """The pattern of 16-bit or 32-bit floats, as unsigned integers. Taken before anything moves `x`: XLA pads a bfloat16
    array by way of float32, and flushes on the way.
    """
    return lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)


def decode(bits: jax.Array, fmt: FloatFormat) -> jax.Array:
    """The float64 values of unsigned patterns; every NaN becomes the default one."""
    wide = lax.convert_element_type(bits, jnp.uint64)
    magnitude = lax.shift_left(lax.bitwise_and(wide, np.uint64(fmt.nan)), np.uint64(MANTISSA - fmt.mantissa_bits))
    rebias = BIAS - 1 + fmt.min_exponent << MANTISSA
    normal = lax.add(magnitude, np.uint64(rebias))
    # With the hidden bit set, a subnormal is its value plus the smallest normal number.
    hidden = lax.add(magnitude, np.uint64(rebias + (1 << MANTISSA)))
    subnormal = _bits(lax.sub(_float(hidden), np.ldexp(1.0, fmt.min_exponent)))
    infinity = np.uint64((1 << fmt.exponent_bits) - 1 << MANTISSA)
    beyond = lax.select(
        lax.eq(magnitude, infinity), lax.full_like(magnitude, EXPONENT), lax.full_like(magnitude, _pattern(np.nan))
    )
    value = lax.select(lax.lt(magnitude, np.uint64(1 << MANTISSA)), subnormal, normal)
    value = lax.select(lax.lt(magnitude, infinity), value, beyond)
    sign = lax.shift_left(lax.shift_right_logical(wide, np.uint64(fmt.bits - 1)), np.uint64(63))
    return _float(lax.bitwise_or(value, sign))


def round_to(x: jax.Array, fmt: FloatFormat) -> jax.Array:
    """float64 values rounded to nearest even in `fmt`, still as float64."""
    bits = _bits(x)
    magnitude = lax.bitwise_and(bits, ~SIGN)
    exponent = lax.max(lax.bitwise_and(bits, EXPONENT), np.uint64(BIAS + fmt.min_exponent << MANTISSA))
    rounded = _rounded(magnitude, exponent, fmt.mantissa_bits)
    largest = 1 - fmt.min_exponent
    overflow = np.ldexp(1.0, largest + 1) - np.ldexp(1.0, largest - fmt.mantissa_bits - 1)
    fits = lax.lt(magnitude, _pattern(overflow))
    rounded = lax.select(fits, rounded, lax.mul(_float(magnitude), np.float64(np.inf)))
    return _with_sign(rounded, bits)


def round32(x: jax.Array) -> jax.Array:
    """float64 values rounded to float32, as float64."""
    return round_to(x, FLOAT32)


def round_to_odd(x: jax.Array, error: jax.Array) -> jax.Array:
    """x, which is `x + error` rounded to nearest, moved to its odd neighbour towards the error if it is even and inexact."""
    bits, zero = _bits(x), np.float64(0)
    above, below = lax.gt(error, zero), lax.lt(error, zero)
    outward = lax.eq(above, lax.gt(x, zero))
    moved = lax.select(outward, lax.add(bits, np.uint64(1)), lax.sub(bits, np.uint64(1)))
    even = lax.eq(lax.bitwise_and(bits, np.uint64(1)), np.uint64(0))
    return _float(lax.select(lax.bitwise_and(lax.bitwise_or(above, below), even), moved, bits))


def snap(x: jax.Array) -> jax.Array:
    """float64 values rounded to 51 bits."""
    bits = _bits(x)
    return _with_sign(_rounded(lax.bitwise_and(bits, ~SIGN), lax.bitwise_and(bits, EXPONENT), 50), bits)


def encode(x: jax.Array, fmt: FloatFormat) -> jax.Array:
    """Unsigned patterns of float64 values that `fmt` holds exactly; every NaN as the canonical pattern."""
    bits = _bits(x)
    magnitude = lax.bitwise_and(bits, ~SIGN)
    smallest = np.ldexp(1.0, fmt.min_exponent)
    rebias = np.uint64(BIAS - 1 + fmt.min_exponent << MANTISSA)
    subnormal = lax.sub(_bits(lax.add(_float(magnitude), smallest)), np.uint64(1 << MANTISSA))
    finite = lax.sub(lax.select(lax.lt(magnitude, _pattern(smallest)), subnormal, magnitude), rebias)
    infinity = np.uint64((1 << fmt.exponent_bits) - 1 << MANTISSA)
    unsigned = lax.shift_right_logical(lax.min(finite, infinity), np.uint64(MANTISSA - fmt.mantissa_bits))
    sign = lax.shift_left(lax.shift_right_logical(bits, np.uint64(63)), np.uint64(fmt.bits - 1))
    is_nan = lax.gt(magnitude, EXPONENT)
    pattern = lax.select(is_nan, lax.full_like(bits, np.uint64(fmt.nan)), lax.bitwise_or(unsigned, sign))
    return lax.convert_element_type(pattern, fmt.storage)


def _rounded(magnitude: jax.Array, exponent: jax.Array, mantissa_bits: int) -> jax.Array:
    """The float64 `magnitude` to nearest even with so many bits behind the one at `exponent`; both are patterns.

    To a power of two that is so much larger, float64 addition rounds as wanted: the sum has its last bit there.
    """
    magic = _float(lax.add(exponent, np.uint64(MANTISSA - mantissa_bits << MANTISSA)))
    return lax.sub(lax.add(_float(magnitude), magic), magic)


def _with_sign(magnitude: jax.Array, bits: jax.Array) -> jax.Array:
    return _float(lax.bitwise_or(_bits(magnitude), lax.bitwise_and(bits, SIGN)))


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint64)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float64)


def _pattern(x: float) -> np.uint64:
    return np.float64(x).view(np.uint64)
