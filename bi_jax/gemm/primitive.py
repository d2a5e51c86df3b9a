"""The JAX primitive behind every public function: [B, M, K] @ [B, K, N] under the contract.

The engine is chosen by the platform that a computation is lowered for, whatever devices this machine has: on CPU
`cpu.gemm`, on CUDA `mosaic.gemm`. Other platforms raise.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import core, lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from bi_jax.gemm import cpu, mosaic
from bi_jax.platforms import ARCHITECTURE, check_capability
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
    """alpha * (A @ B) + beta * bias -> [B, M, N] of `out_dtype`.

    Args:
        a: [B or 1, M, K], or [B or 1, K, M] with `transpose_lhs`.
        b: [B or 1, K, N], or [B or 1, N, K] with `transpose_rhs`, of the same dtype.
        bias: [B or 1, M or 1, N or 1], or None.
    """
    operands = (a, b) if bias is None else (a, b, bias)
    return gemm_p.bind(
        *operands,
        alpha=alpha,
        beta=beta,
        contract=contract,
        out_dtype=jnp.dtype(out_dtype),
        transpose_lhs=transpose_lhs,
        transpose_rhs=transpose_rhs,
    )


def _shape(a: Any, b: Any, transpose_lhs: bool, transpose_rhs: bool) -> tuple[int, int, int, int]:
    """(B, M, N, K)."""
    m, k = a.shape[:0:-1] if transpose_lhs else a.shape[1:]
    return max(a.shape[0], b.shape[0]) if a.shape[0] and b.shape[0] else 0, m, b.shape[1 if transpose_rhs else 2], k


@gemm_p.def_abstract_eval
def _abstract(
    a: Any, b: Any, *bias: Any, out_dtype: Any, transpose_lhs: bool, transpose_rhs: bool, **_: Any
) -> core.ShapedArray:
    return core.ShapedArray(_shape(a, b, transpose_lhs, transpose_rhs)[:3], out_dtype)


@gemm_p.def_impl
def _eager(*operands: jax.Array, **params: Any) -> jax.Array:
    return _jitted(operands, tuple(sorted(params.items())))


def _bind(operands: tuple[jax.Array, ...], params: tuple[tuple[str, Any], ...]) -> jax.Array:
    return gemm_p.bind(*operands, **dict(params))


_jitted = jax.jit(_bind, static_argnums=1)


def _on_cpu(
    a: jax.Array, b: jax.Array, bias: jax.Array | None = None, *, transpose_lhs: bool, transpose_rhs: bool, **params: Any
) -> jax.Array:
    batch = max(a.shape[0], b.shape[0])
    a, b = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (a, b))
    a, b = a.mT if transpose_lhs else a, b.mT if transpose_rhs else b
    return cpu.gemm(a, b, bias, **params)


def _on_cuda(a: jax.Array, b: jax.Array, bias: jax.Array | None = None, **params: Any) -> jax.Array:
    check_capability()
    return mosaic.gemm(a, b, bias, **params)


def _lowering(engine: Any) -> Any:
    """The lowering that runs `engine` on everything but empty extents."""

    def run(
        a: jax.Array, b: jax.Array, *bias: jax.Array, transpose_lhs: bool, transpose_rhs: bool, out_dtype: Any, **params: Any
    ) -> jax.Array:
        batch, m, n, k = _shape(a, b, transpose_lhs, transpose_rhs)
        if not batch * m * n:
            return jnp.zeros((batch, m, n), out_dtype)
        if k == 0:
            a, b = (jnp.zeros([max(size, 1) for size in x.shape], x.dtype) for x in (a, b))
        return engine(a, b, *bias, transpose_lhs=transpose_lhs, transpose_rhs=transpose_rhs, out_dtype=out_dtype, **params)

    return mlir.lower_fun(run, multiple_results=False)


def _unsupported(ctx: mlir.LoweringRuleContext, *_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        f"bi_jax: no GEMM for {ctx.module_context.platforms}: supported are cpu and cuda ({ARCHITECTURE})"
    )


mlir.register_lowering(gemm_p, _unsupported)
mlir.register_lowering(gemm_p, _lowering(_on_cpu), platform="cpu")
mlir.register_lowering(gemm_p, _lowering(_on_cuda), platform="cuda")


def _batch(operands: tuple[jax.Array, ...], axes: tuple[int | None, ...], **params: Any) -> tuple[jax.Array, int]:
    """vmap: more rows where only A is mapped, a larger batch otherwise. The bits of a row do not depend on which."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    a, b, *bias = (x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True))
    mapped = [axis is not None for axis in axes]
    if not any(mapped[:2]):
        a, mapped[0] = jnp.broadcast_to(a, (size, *a.shape)), True
    operands = a, b, *bias
    one_bias = not bias or (not mapped[2] and bias[0].shape[:2] == (1, 1))
    if mapped[0] and not mapped[1] and b.shape[0] == 1 and one_bias and not params["transpose_lhs"]:
        out = gemm_p.bind(a.reshape(1, math.prod(a.shape[:-1]), a.shape[-1]), b, *bias, **params)
        return out.reshape(*a.shape[:-1], out.shape[-1]), 0
    inner = max(x.shape[1 if is_mapped else 0] for x, is_mapped in zip(operands, mapped, strict=True))

    def widen(x: jax.Array, is_mapped: bool) -> jax.Array:
        if not is_mapped and x.shape[0] == 1:
            return x
        x = x if is_mapped else x[None]
        return jnp.broadcast_to(x, (size, inner, *x.shape[2:])).reshape(size * inner, *x.shape[2:])

    out = gemm_p.bind(*map(widen, operands, mapped), **params)
    return lax.reshape(out, (size, inner, *out.shape[1:])), 0


batching.primitive_batchers[gemm_p] = _batch
