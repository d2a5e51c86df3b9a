"""float32 and 16-bit floats as float64 values inside XLA computations for a CPU, where float32 arithmetic is not IEEE's.

XLA on a CPU flushes float32 subnormals, on conversion to float64 too, contracts products with sums and rewrites chains of
constants. None of that reaches the bits here. Values are float64 and hold exactly what a narrower format holds, so no
operand is subnormal; patterns are decoded and encoded by integer operations; and every rounding passes through integers,
so XLA never sees two float64 operations in a row that it could combine. For use under `jax.enable_x64`.
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
    wide = bits.astype(jnp.uint64)
    magnitude = (wide & fmt.nan) << (MANTISSA - fmt.mantissa_bits)
    rebias = BIAS - 1 + fmt.min_exponent << MANTISSA
    normal = _float(magnitude + np.uint64(rebias))
    # With the hidden bit set, a subnormal is its value plus the smallest normal number.
    smallest = np.ldexp(1.0, fmt.min_exponent)
    subnormal = _float(magnitude + np.uint64(rebias + (1 << MANTISSA))) - smallest
    infinity = np.uint64((1 << fmt.exponent_bits) - 1 << MANTISSA)
    value = jnp.where(magnitude < np.uint64(1 << MANTISSA), subnormal, normal)
    value = jnp.where(magnitude < infinity, value, jnp.where(magnitude == infinity, jnp.inf, jnp.nan))
    return _float(_bits(value) | (wide >> (fmt.bits - 1)) << 63)


def round_to(x: jax.Array, fmt: FloatFormat) -> jax.Array:
    """float64 values rounded to nearest even in `fmt`, still as float64."""
    bits = _bits(x)
    magnitude = bits & ~SIGN
    exponent = jnp.maximum(bits & EXPONENT, np.uint64(BIAS + fmt.min_exponent << MANTISSA))
    rounded = _rounded(magnitude, exponent, fmt.mantissa_bits)
    largest = 1 - fmt.min_exponent
    overflow = np.ldexp(1.0, largest + 1) - np.ldexp(1.0, largest - fmt.mantissa_bits - 1)
    rounded = jnp.where(magnitude < _pattern(overflow), rounded, _float(magnitude) * np.inf)
    return _float(_bits(rounded) | bits & SIGN)


def round_to_odd(x: jax.Array, error: jax.Array) -> jax.Array:
    """x, which is `x + error` rounded to nearest, moved to its odd neighbour towards the error if it is even and inexact."""
    bits = _bits(x)
    above, below = error > 0, error < 0
    moved = jnp.where(above == (x > 0), bits + np.uint64(1), bits - np.uint64(1))
    return _float(jnp.where((above | below) & (bits & np.uint64(1) == 0), moved, bits))


def snap(x: jax.Array) -> jax.Array:
    """float64 values rounded to 51 bits."""
    bits = _bits(x)
    return _float(_bits(_rounded(bits & ~SIGN, bits & EXPONENT, 50)) | bits & SIGN)


def _rounded(magnitude: jax.Array, exponent: jax.Array, mantissa_bits: int) -> jax.Array:
    """The float64 `magnitude` to nearest even with so many bits behind the one at `exponent`; both are patterns.

    To a power of two that is so much larger, float64 addition rounds as wanted: the sum has its last bit there.
    """
    magic = _float(exponent + np.uint64(MANTISSA - mantissa_bits << MANTISSA))
    return (_float(magnitude) + magic) - magic


def encode(x: jax.Array, fmt: FloatFormat) -> jax.Array:
    """Unsigned patterns of float64 values that `fmt` holds exactly; every NaN as the canonical pattern."""
    bits = _bits(x)
    magnitude = bits & ~SIGN
    smallest = np.ldexp(1.0, fmt.min_exponent)
    rebias = np.uint64(BIAS - 1 + fmt.min_exponent << MANTISSA)
    subnormal = _bits(_float(magnitude) + smallest) - np.uint64(1 << MANTISSA)
    finite = jnp.where(magnitude < _pattern(smallest), subnormal, magnitude) - rebias
    infinity = np.uint64((1 << fmt.exponent_bits) - 1 << MANTISSA)
    signed = jnp.minimum(finite, infinity) >> (MANTISSA - fmt.mantissa_bits) | (bits >> 63) << (fmt.bits - 1)
    return jnp.where(magnitude > EXPONENT, np.uint64(fmt.nan), signed).astype(fmt.storage)


def round32(x: jax.Array) -> jax.Array:
    """float64 values rounded to float32, as float64."""
    return round_to(x, FLOAT32)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint64)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float64)


def _pattern(x: float) -> np.uint64:
    return np.float64(x).view(np.uint64)
