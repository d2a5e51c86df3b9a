"""The JAX primitive behind every product: [*, M, K] @ [*, K, N] with broadcast batch dimensions, under the contract.

On CPU it is `cpu.gemm`, on CUDA `mosaic.gemm`, both of which take [B, M, K] and [B, K, N]. Its derivatives are in `gradient`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import core
from jax.extend.core import Primitive
from jax.interpreters import batching

from bi_jax.engines import define, result_type, varying
from bi_jax.gemm import cpu, mosaic
from shared_specs import GemmContract

gemm_p = Primitive("bi_gemm")


def gemm(
    a: jax.Array,
    b: jax.Array,
    bias: jax.Array | None,
    *,
    alpha: float,
    beta: float,
    contract: GemmContract,
    out_dtype: Any,
    transpose_lhs: bool = False,
    transpose_rhs: bool = False,
) -> jax.Array:
    """alpha * (A @ B) + beta * bias -> [*, M, N] of `out_dtype`.

    Args:
        a: [*, M, K], or [*, K, M] with `transpose_lhs`.
        b: [*, K, N], or [*, N, K] with `transpose_rhs`, of the same dtype.
        bias: broadcastable to [*, M, N], or None.
        alpha: factor of the product.
        beta: factor of the bias.
        contract: the bits.
        out_dtype: dtype of the result.
        transpose_lhs: a is stored with its last two dimensions swapped.
        transpose_rhs: b is.
    """
    operands = varying((a, b) if bias is None else (a, b, bias))
    return gemm_p.bind(
        *operands,
        alpha=alpha,
        beta=beta,
        contract=contract,
        out_dtype=jnp.dtype(out_dtype),
        transpose_lhs=transpose_lhs,
        transpose_rhs=transpose_rhs,
    )


@gemm_p.def_abstract_eval
def _abstract(
    a: Any, b: Any, *bias: Any, out_dtype: Any, transpose_lhs: bool, transpose_rhs: bool, **_: Any
) -> core.ShapedArray:
    return result_type("gemm", _shape(a, b, transpose_lhs, transpose_rhs), out_dtype, (a, b, *bias))


def _shape(a: Any, b: Any, transpose_lhs: bool, transpose_rhs: bool) -> tuple[int, ...]:
    """[*, M, N]."""
    rows, columns = a.shape[-1 if transpose_lhs else -2], b.shape[-2 if transpose_rhs else -1]
    return (*jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2]), rows, columns)


def _engine(run: Any) -> Any:
    """What `run` computes of [B or 1, M, K], [B or 1, K, N] and a bias of as many dimensions, for operands of any shape."""

    def engine(
        a: jax.Array,
        b: jax.Array,
        bias: jax.Array | None = None,
        *,
        out_dtype: Any,
        transpose_lhs: bool,
        transpose_rhs: bool,
        **params: Any,
    ) -> jax.Array:
        shape = _shape(a, b, transpose_lhs, transpose_rhs)
        if not math.prod(shape):
            return jnp.zeros(shape, out_dtype)
        if 0 in a.shape:
            a, b = (jnp.zeros([max(size, 1) for size in x.shape], x.dtype) for x in (a, b))
        if math.prod(b.shape[:-2]) == 1 and not transpose_lhs:
            a, b = a.reshape(1, math.prod(a.shape[:-1]), a.shape[-1]), b.reshape(1, *b.shape[-2:])
            bias = None if bias is None else _folded_bias(bias, shape)
        else:
            a, b = _batched(a, shape[:-2]), _batched(b, shape[:-2])
            bias = None if bias is None else _batched(bias.reshape((1,) * (2 - bias.ndim) + bias.shape), shape[:-2])
        layout = {"transpose_lhs": transpose_lhs, "transpose_rhs": transpose_rhs}
        return run(a, b, bias, out_dtype=out_dtype, **layout, **params).reshape(shape)

    return engine


def _batched(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """x [*, R, C] as [B, R, C], or as [1, R, C] where it is broadcast over the whole batch."""
    if math.prod(x.shape[:-2]) != 1:
        x = jnp.broadcast_to(x, (*batch, *x.shape[-2:]))
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _folded_bias(bias: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The bias of a product whose batch is folded into M: one row for all, or every row."""
    if math.prod(bias.shape[:-1]) == 1:
        return bias.reshape(1, 1, -1)
    return jnp.broadcast_to(bias, shape).reshape(1, math.prod(shape[:-1]), shape[-1])


def _on_cpu(
    a: jax.Array, b: jax.Array, bias: jax.Array | None, *, transpose_lhs: bool, transpose_rhs: bool, **params: Any
) -> jax.Array:
    batch = max(a.shape[0], b.shape[0])
    a, b = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (a, b))
    a, b = a.mT if transpose_lhs else a, b.mT if transpose_rhs else b
    return cpu.gemm(a, b, bias, **params)


define(gemm_p, lambda **_: "GEMM", _engine(_on_cpu), _engine(mosaic.gemm))


def _batch(operands: tuple[jax.Array, ...], axes: tuple[int | None, ...], **params: Any) -> tuple[jax.Array, int]:
    """vmap: one more batch dimension, in front of all others."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    inner = max(x.ndim - (axis is not None) for x, axis in zip(operands, axes, strict=True))

    def lead(x: jax.Array, axis: int | None) -> jax.Array:
        if axis is None:
            return x
        x = jnp.moveaxis(x, axis, 0)
        return x.reshape(size, *(1,) * (inner + 1 - x.ndim), *x.shape[1:])

    moved = [lead(x, axis) for x, axis in zip(operands, axes, strict=True)]
    if axes[0] is None and axes[1] is None:
        moved[0] = jnp.broadcast_to(moved[0], (size, *(1,) * (inner - moved[0].ndim), *moved[0].shape))
    return gemm_p.bind(*moved, **params), 0


batching.primitive_batchers[gemm_p] = _batch
