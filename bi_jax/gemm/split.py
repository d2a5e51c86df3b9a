"""float32 operands as sums of bfloat16 parts, by integer operations that no compiler rewrites and no flush-to-zero reaches."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from shared_specs.contract import Float32Split

_SIGN = np.uint32(0x8000_0000)
_TOP = np.uint32(0xFFFF_0000)


def split(x: jax.Array, rule: Float32Split) -> list[jax.Array]:
    """The `rule.parts` bfloat16 parts of float32 `x`, largest first: `Float32Split` says how they are cut."""
    if rule.part != "bfloat16":
        raise NotImplementedError(f"parts of format {rule.part}")
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    field = (bits >> 23) & 0xFF
    finite = field < 0xFF
    is_nan = (field == 0xFF) & ((bits & 0x7F_FFFF) != 0)
    scale = jnp.maximum(field, 1)
    rest = jnp.where(finite, bits & 0xFFFF, 0)
    sign = jnp.where(finite, bits & _SIGN, 0)

    parts = [jnp.where(is_nan, jnp.uint32(0x7FFF), bits >> 16)]
    for _ in range(1, rule.parts):
        magnitude, left = _rounded(rest, scale)
        parts.append((magnitude | sign) >> 16)
        rest = jnp.abs(left).astype(jnp.uint32)
        sign = jnp.where(left < 0, sign ^ _SIGN, sign)
    return [lax.bitcast_convert_type(part.astype(jnp.uint16), jnp.bfloat16) for part in parts]


def _rounded(rest: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 bits of rest * 2^(scale - 150) rounded to bfloat16, and what the integer `rest` < 2^16 exceeds that by."""
    integer = lax.bitcast_convert_type(rest.astype(jnp.float32), jnp.uint32)
    exponent = (integer >> 23).astype(jnp.int32) + scale.astype(jnp.int32) - 150
    is_normal = (exponent >= 1) & (rest != 0)
    normal = (exponent.astype(jnp.uint32) << 23) | (integer & 0x7F_FFFF)
    magnitude = _nearest(jnp.where(is_normal, normal, rest << (scale - 1)))
    kept = lax.bitcast_convert_type(_nearest(integer), jnp.float32).astype(jnp.int32)
    return magnitude, jnp.where(is_normal, rest.astype(jnp.int32) - kept, 0)


def _nearest(bits: jax.Array) -> jax.Array:
    """float32 bits rounded to the upper half, ties to even."""
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & _TOP
