"""The differentiable product of [*, M, K] and [*, K, N] with broadcast batch dimensions.

Gradients are products under the same contract, so they too are the same bits in every schedule, framework and run:

    dA = alpha * G @ B^T,  dB = alpha * A^T @ G,  dbias = beta * (ones @ G)

with the cotangent G rounded to the operand dtype first. Where an operand was broadcast, the sum over its batch is part
of the product's K, outer dimensions first; there is no second reduction.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bi_jax.gemm import primitive
from shared_specs import gemm_contract


@dataclass(frozen=True)
class Params:
    """What is static about a product. `transpose_*` say that an operand is stored with its last two dimensions swapped."""

    alpha: float
    beta: float
    out_dtype: Any
    transpose_lhs: bool = False
    transpose_rhs: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(a: jax.Array, b: jax.Array, bias: jax.Array | None, params: Params) -> jax.Array:
    """alpha * (A @ B) + beta * bias, [*, M, N]; the bias is broadcastable to that."""
    rows, cols = a.shape[-1 if params.transpose_lhs else -2], b.shape[-2 if params.transpose_rhs else -1]
    batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*batch, rows, cols)
    if b.ndim == 2 and not params.transpose_lhs:
        a, b = a.reshape(1, math.prod(a.shape[:-1]), a.shape[-1]), b[None]
        bias = None if bias is None else _folded_bias(bias, shape)
    else:
        a, b = _batched(a, batch), _batched(b, batch)
        bias = None if bias is None else _batched(bias.reshape((1,) * (2 - bias.ndim) + bias.shape), batch)
    out = primitive.gemm(
        a,
        b,
        bias,
        alpha=params.alpha,
        beta=params.beta,
        contract=gemm_contract(a.dtype.name),
        out_dtype=params.out_dtype,
        transpose_lhs=params.transpose_lhs,
        transpose_rhs=params.transpose_rhs,
    )
    return out.reshape(shape)


def _batched(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """x [*, R, C] as [B, R, C], or as [1, R, C] where it is broadcast over the whole batch."""
    if math.prod(x.shape[:-2]) != 1 or math.prod(batch) == 0:
        x = jnp.broadcast_to(x, (*batch, *x.shape[-2:]))
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _folded_bias(bias: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The bias of a product whose batch is folded into M: one row for all, or every row."""
    if math.prod(bias.shape[:-1]) == 1:
        return bias.reshape(1, 1, -1)
    return jnp.broadcast_to(bias, shape).reshape(1, math.prod(shape[:-1]), shape[-1])


def _forward(a: jax.Array, b: jax.Array, bias: jax.Array | None, params: Params) -> tuple[jax.Array, tuple]:
    return product(a, b, bias, params), (a, b, bias)


def _backward(params: Params, saved: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    a, b, bias = saved
    g = cotangent.astype(a.dtype)
    swap_a, swap_b = params.transpose_lhs, params.transpose_rhs
    symmetric = gemm_contract(a.dtype.name).split is None  # B^T @ A^T has the bits of A @ B; not so for the parts of float32
    if swap_a and symmetric:
        grad_a = _reduced_product(b, g, swap_b, True, a.shape, params.alpha)
    else:
        grad_a = _reduced_product(g, b, False, not swap_b, _swapped(a.shape, swap_a), params.alpha)
        grad_a = grad_a.mT if swap_a else grad_a
    if swap_b and symmetric:
        grad_b = _reduced_product(g, a, True, swap_a, b.shape, params.alpha)
    else:
        grad_b = _reduced_product(a, g, not swap_a, False, _swapped(b.shape, swap_b), params.alpha)
        grad_b = grad_b.mT if swap_b else grad_b
    return grad_a, grad_b, None if bias is None else _reduced_sum(g, bias, params.beta)


product.defvjp(_forward, _backward)


def _swapped(shape: tuple[int, ...], swap: bool) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if swap else shape


def _reduced_product(
    x: jax.Array, y: jax.Array, transpose_x: bool, transpose_y: bool, shape: tuple[int, ...], alpha: float
) -> jax.Array:
    """alpha * (X @ Y), summed over the batch dimensions that the operand of `shape` was broadcast along."""
    batch = jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    summed = _broadcast_dims(batch, shape[:-2])
    params = Params(alpha, 1.0, x.dtype, transpose_x, transpose_y)
    if summed:
        x, y = x.mT if transpose_x else x, y.mT if transpose_y else y
        x, y = (jnp.broadcast_to(z, (*batch, *z.shape[-2:])) for z in (x, y))
        kept = [i for i in range(len(batch)) if i not in summed]
        sizes = [batch[i] for i in kept]
        k = math.prod(batch[i] for i in summed) * x.shape[-1]
        row, col = len(batch), len(batch) + 1
        x = x.transpose(*kept, row, *summed, col).reshape(*sizes, x.shape[-2], k)
        y = y.transpose(*kept, *summed, row, col).reshape(*sizes, k, y.shape[-1])
        params = replace(params, transpose_lhs=False, transpose_rhs=False)
    return product(x, y, None, params).reshape(shape)


def _reduced_sum(g: jax.Array, bias: jax.Array, beta: float) -> jax.Array:
    """beta * G, summed over the dimensions that the bias was broadcast along, as a product with ones."""
    summed = _broadcast_dims(g.shape, bias.shape)
    kept = [i for i in range(g.ndim) if i not in summed]
    terms = math.prod(g.shape[i] for i in summed)
    g = g.transpose(*summed, *kept).reshape(terms, math.prod(g.shape[i] for i in kept))
    return product(jnp.ones((1, terms), g.dtype), g, None, Params(beta, 1.0, bias.dtype)).reshape(bias.shape)


def _broadcast_dims(shape: tuple[int, ...], own: tuple[int, ...]) -> list[int]:
    """The dimensions of `shape` along which an array of shape `own` is repeated."""
    own = (1,) * (len(shape) - len(own)) + own
    return [i for i, size in enumerate(shape) if own[i] == 1 and size != 1]
