"""JAX's own operations under the names that the model uses: what a user has without this library."""

from typing import Any

import jax
import jax.numpy as jnp


def embedding(ids: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows of weight."""
    return weight[ids]


def log_softmax(input: jax.Array, dim: int) -> jax.Array:
    """The logarithm of softmax."""
    return jax.nn.log_softmax(input, dim)


def cross_entropy(input: jax.Array, target: jax.Array) -> jax.Array:
    """The mean of -log_softmax(input) at the targets."""
    return -jnp.take_along_axis(jax.nn.log_softmax(input, -1), target[:, None], -1).mean()


def scaled_dot_product_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, is_causal: bool, enable_gqa: bool
) -> jax.Array:
    """jax.nn.dot_product_attention, which has heads behind the sequence and shares keys by itself."""
    q, k, v = (x.swapaxes(1, 2) for x in (query, key, value))
    return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal).swapaxes(1, 2)


def linear(input: jax.Array, weight: jax.Array, *, out_dtype: Any = None) -> jax.Array:
    """input @ weight^T; a wider result is a conversion."""
    y = input @ weight.T
    return y if out_dtype is None else y.astype(out_dtype)


def rotary_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [T, head_dim / 2]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2) / head_dim)
    angles = positions[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotary_embedding(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Element i and element i + head_dim / 2 turned."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def fused_add_rms_norm(input: jax.Array, residual: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """(rms_norm(h), h) with h = input + residual."""
    h = input + residual
    wide = h.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return normal.astype(h.dtype) * weight, h


def silu_mul(gate: jax.Array, up: jax.Array) -> jax.Array:
    """The gated MLP."""
    return jax.nn.silu(gate) * up
