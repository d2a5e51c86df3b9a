"""float32 operands as sums of bfloat16 parts, by integer operations that no compiler rewrites and no flush-to-zero reaches."""

import jax
import jax.numpy as jnp
from jax import lax

from shared_specs.contract import Float32Split

_SIGN = jnp.uint32(0x8000_0000)
_TOP = jnp.uint32(0xFFFF_0000)


def split(x: jax.Array, rule: Float32Split) -> list[jax.Array]:
    """The `rule.parts` bfloat16 parts of float32 `x`, largest first.

    A finite x is cut into 8 + 8 + 8 bits, each part truncated (below 2^-126 to multiples of 2^-133). An infinity is part 0
    alone, a NaN the canonical NaN in part 0.
    """
    if rule.part != "bfloat16":
        raise NotImplementedError(f"parts of format {rule.part}")
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    field = (bits >> 23) & 0xFF
    finite = field < 0xFF
    is_nan = (field == 0xFF) & ((bits & 0x7F_FFFF) != 0)
    scale = jnp.maximum(field, 1)
    rest = jnp.where(finite, bits & 0xFFFF, 0)

    parts = [jnp.where(is_nan, jnp.uint32(0x7FFF), bits >> 16)]
    for _ in range(1, rule.parts):
        part, rest = _truncated(rest, scale)
        parts.append((part | jnp.where(finite, bits & _SIGN, 0)) >> 16)
    return [lax.bitcast_convert_type(part.astype(jnp.uint16), jnp.bfloat16) for part in parts]


def _truncated(rest: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 bits of rest * 2^(scale - 150) truncated to bfloat16, and what is left of the integer `rest` < 2^16."""
    integer = lax.bitcast_convert_type(rest.astype(jnp.float32), jnp.uint32)
    exponent = (integer >> 23).astype(jnp.int32) + scale.astype(jnp.int32) - 150
    normal = (exponent.astype(jnp.uint32) << 23) | (integer & 0x7F_0000)
    kept = lax.bitcast_convert_type(integer & _TOP, jnp.float32).astype(jnp.uint32)
    subnormal = (rest << (scale - 1)) & _TOP
    is_normal = (exponent >= 1) & (rest != 0)
    return jnp.where(is_normal, normal, subnormal), jnp.where(is_normal, rest - kept, 0)
