"""float32 to a 16-bit dtype by integer operations: XLA's conversion flushes subnormals on a CPU and keeps NaN payloads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from shared_specs.formats import FLOAT32, float_format


def narrow(x: jax.Array, dtype: Any) -> jax.Array:
    """Values, float32 or of `dtype`, rounded once, to nearest even, to `dtype`; every NaN becomes the canonical one."""
    dtype = jnp.dtype(dtype)
    if x.dtype == dtype:
        return x
    fmt = float_format(dtype.name)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = bits & np.uint32(FLOAT32.nan)
    field = jnp.maximum(magnitude >> FLOAT32.mantissa_bits, np.uint32(1)).astype(jnp.int32)
    significand = magnitude - (
        (field - 1).astype(jnp.uint32) << FLOAT32.mantissa_bits
    )  # with the hidden bit of a normal number
    smallest = fmt.min_exponent - FLOAT32.min_exponent + 1
    below = jnp.clip(smallest - field, 0, fmt.mantissa_bits + 2).astype(jnp.uint32)
    dropped = np.uint32(FLOAT32.mantissa_bits - fmt.mantissa_bits) + below
    half = (np.uint32(1) << (dropped - np.uint32(1))) - np.uint32(1)
    rounded = (significand + half + ((significand >> dropped) & np.uint32(1))) >> dropped
    # The hidden bit of a normal number adds one to the exponent field, as does a carry.
    infinity = np.uint32((1 << fmt.exponent_bits) - 1 << fmt.mantissa_bits)
    exponent = jnp.maximum(field - smallest, 0).astype(jnp.uint32) << fmt.mantissa_bits
    pattern = jnp.minimum(rounded + exponent, infinity) | ((bits >> 31) << (fmt.bits - 1))
    is_nan = magnitude > np.uint32(0xFF << FLOAT32.mantissa_bits)
    return lax.bitcast_convert_type(jnp.where(is_nan, np.uint32(fmt.nan), pattern).astype(fmt.storage), dtype)
