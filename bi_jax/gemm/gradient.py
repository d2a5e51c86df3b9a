"""The derivatives of the product of [*, M, K] and [*, K, N] with broadcast batch dimensions.

The product is linear in each operand, so its derivatives are products under the same contract, and the same bits in every
schedule, framework and run. Gradients:

    dA = alpha * G @ B^T,  dB = alpha * A^T @ G,  dbias = beta * (ones @ G)

with the cotangent G rounded to the operand dtype first. Where an operand was broadcast, the sum over its batch is part
of the product's K, outer dimensions first; there is no second reduction. Tangents:

    alpha * dA @ B + alpha * A @ dB + beta * dbias

with each product rounded to the output dtype, the bias in the first.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from bi_jax.gemm import primitive
from bi_jax.narrow import narrow
from shared_specs import gemm_contract


@dataclass(frozen=True)
class Params:
    """What is static about a product. `transpose_*` say that an operand is stored with its last two dimensions swapped."""

    alpha: float
    beta: float
    out_dtype: Any
    transpose_lhs: bool = False
    transpose_rhs: bool = False


def product(a: jax.Array, b: jax.Array, bias: jax.Array | None, params: Params) -> jax.Array:
    """alpha * (A @ B) + beta * bias, [*, M, N], under the contract of its operands; the bias is broadcastable to that."""
    return primitive.gemm(
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


def _tangent(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...], **params: Any) -> tuple[jax.Array, Any]:
    (a, b, *_), (da, db, *dbias) = primals, tangents
    moved = [t for t in dbias if not isinstance(t, ad.Zero)]
    pairs = [pair for pair in ((da, b), (a, db)) if not any(isinstance(x, ad.Zero) for x in pair)]
    if not pairs:
        pairs = [(jnp.zeros_like(a), b)]
    terms = [primitive.gemm(x, y, bias, **params) for (x, y), bias in zip(pairs, [*moved, None, None], strict=False)]
    return primitive.gemm_p.bind(*primals, **params), terms[0] if len(terms) == 1 else lax.add(*terms)


def _transpose(
    cotangent: Any, a: Any, b: Any, *bias: Any, alpha: float, beta: float, transpose_lhs: bool, transpose_rhs: bool, **_: Any
) -> list[jax.Array | None]:
    """The gradients of the operands that the product is linear in, which are those that are undefined."""
    operands = (a, b, *bias)
    if isinstance(cotangent, ad.Zero):
        return [None] * len(operands)
    shapes = [x.aval.shape if ad.is_undefined_primal(x) else x.shape for x in operands]
    dtype = (b if ad.is_undefined_primal(a) else a).dtype
    g = narrow(cotangent, dtype)
    symmetric = gemm_contract(dtype.name).split is None  # B^T @ A^T has the bits of A @ B; not so for the parts of float32
    gradients: list[jax.Array | None] = [None] * len(operands)
    if ad.is_undefined_primal(a):
        if transpose_lhs and symmetric:
            gradients[0] = _reduced_product(b, g, transpose_rhs, True, shapes[0], alpha)
        else:
            grad = _reduced_product(g, b, False, not transpose_rhs, _swapped(shapes[0], transpose_lhs), alpha)
            gradients[0] = grad.mT if transpose_lhs else grad
    if ad.is_undefined_primal(b):
        if transpose_rhs and symmetric:
            gradients[1] = _reduced_product(g, a, True, transpose_lhs, shapes[1], alpha)
        else:
            grad = _reduced_product(a, g, not transpose_lhs, False, _swapped(shapes[1], transpose_rhs), alpha)
            gradients[1] = grad.mT if transpose_rhs else grad
    if bias and ad.is_undefined_primal(bias[0]):
        gradients[2] = _reduced_sum(g, shapes[2], bias[0].aval.dtype, beta)
    return gradients


ad.primitive_jvps[primitive.gemm_p] = _tangent
ad.primitive_transposes[primitive.gemm_p] = _transpose


def _swapped(shape: tuple[int, ...], swap: bool) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if swap else shape


def _reduced_product(
    x: jax.Array, y: jax.Array, transpose_x: bool, transpose_y: bool, shape: tuple[int, ...], alpha: float
) -> jax.Array:
    """alpha * (X @ Y), summed over the batch dimensions that the operand of `shape` was broadcast along."""
    batch = jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    summed = _broadcast_dims(batch, shape[:-2])
    if summed:
        x, y = x.mT if transpose_x else x, y.mT if transpose_y else y
        transpose_x = transpose_y = False
        x, y = (jnp.broadcast_to(z, (*batch, *z.shape[-2:])) for z in (x, y))
        kept = [i for i in range(len(batch)) if i not in summed]
        sizes = [batch[i] for i in kept]
        k = math.prod(batch[i] for i in summed) * x.shape[-1]
        row, col = len(batch), len(batch) + 1
        x = x.transpose(*kept, row, *summed, col).reshape(*sizes, x.shape[-2], k)
        y = y.transpose(*kept, *summed, row, col).reshape(*sizes, k, y.shape[-1])
    return product(x, y, None, Params(alpha, 1.0, x.dtype, transpose_x, transpose_y)).reshape(shape)


def _reduced_sum(g: jax.Array, shape: tuple[int, ...], dtype: Any, beta: float) -> jax.Array:
    """beta * G, summed over the dimensions that a bias of `shape` was broadcast along, as a product with ones."""
    summed = _broadcast_dims(g.shape, shape)
    kept = [i for i in range(g.ndim) if i not in summed]
    terms = math.prod(g.shape[i] for i in summed)
    g = g.transpose(*summed, *kept).reshape(terms, math.prod(g.shape[i] for i in kept))
    return product(jnp.ones((1, terms), g.dtype), g, None, Params(beta, 1.0, dtype)).reshape(shape)


def _broadcast_dims(shape: tuple[int, ...], own: tuple[int, ...]) -> list[int]:
    """The dimensions of `shape` along which an array of shape `own` is repeated."""
    own = (1,) * (len(shape) - len(own)) + own
    return [i for i, size in enumerate(shape) if own[i] == 1 and size != 1]
