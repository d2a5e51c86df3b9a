"""The public GEMM functions. Each has the bits that the contract fixes for its operand dtype, on CPU and CUDA alike.

Operands are bfloat16, float16 or float32 and share one dtype; the output has that dtype, or float32 if `out_dtype` says
so. A bias has the operands' dtype or float32. alpha and beta are Python numbers, rounded to float32 once. All functions
work under every transformation of JAX; inside `jax.shard_map` they compute on the shards of a device.

Gradients run through the same kernels: dX = dY W^T and dW = X^T dY are products under the contract. dW sums over the
rows of the batch, so it depends on the batch by nature; it has the same bits in every schedule, in both frameworks and in
every run, and rows of zeros at the end of the batch leave it alone.

Errors, for every function, at trace time: TypeError for an argument that is no array, for dtypes that are mixed or not
supported and for an alpha or beta that is traced; ValueError for shapes that do not match; NotImplementedError when
lowered for a platform or a GPU without kernels.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bi_jax.gemm.gradient import Params, product

DTYPES = ("bfloat16", "float16", "float32")
"""Operand dtypes."""


def mm(a: jax.Array, b: jax.Array, *, out_dtype: Any = None) -> jax.Array:
    """a [M, K] @ b [K, N] -> [M, N]."""
    a, b = _arrays("mm", a=a, b=b)
    _check_dims("mm", 2, a=a, b=b)
    return _run("mm", a, b, None, 1.0, 1.0, out_dtype)


def addmm(
    bias: jax.Array, a: jax.Array, b: jax.Array, *, beta: float = 1.0, alpha: float = 1.0, out_dtype: Any = None
) -> jax.Array:
    """beta * bias + alpha * (a [M, K] @ b [K, N]) -> [M, N].

    Both products and their sum are rounded one by one in float32. The bias is broadcastable to [M, N]; with beta = 0 it is
    not read.
    """
    bias, a, b = _arrays("addmm", bias=bias, a=a, b=b)
    _check_dims("addmm", 2, a=a, b=b)
    return _run("addmm", a, b, bias, alpha, beta, out_dtype)


def bmm(a: jax.Array, b: jax.Array, *, out_dtype: Any = None) -> jax.Array:
    """a [B, M, K] @ b [B, K, N] -> [B, M, N]; the batch sizes are equal."""
    a, b = _arrays("bmm", a=a, b=b)
    _check_batches("bmm", a, b)
    return _run("bmm", a, b, None, 1.0, 1.0, out_dtype)


def baddbmm(
    bias: jax.Array, a: jax.Array, b: jax.Array, *, beta: float = 1.0, alpha: float = 1.0, out_dtype: Any = None
) -> jax.Array:
    """beta * bias + alpha * (a [B, M, K] @ b [B, K, N]) -> [B, M, N]; roundings as in `addmm`."""
    bias, a, b = _arrays("baddbmm", bias=bias, a=a, b=b)
    _check_batches("baddbmm", a, b)
    return _run("baddbmm", a, b, bias, alpha, beta, out_dtype)


def matmul(a: jax.Array, b: jax.Array, *, out_dtype: Any = None) -> jax.Array:
    """jnp.matmul: 1-D operands are a row or a column that the result drops, batch dimensions broadcast."""
    a, b = _arrays("matmul", a=a, b=b)
    if a.ndim == 0 or b.ndim == 0:
        raise ValueError(f"bi_jax.matmul: a and b need at least one dimension, got {a.shape} and {b.shape}")
    row, column = a.ndim == 1, b.ndim == 1
    a, b = a[None] if row else a, b[:, None] if column else b
    out = _run("matmul", a, b, None, 1.0, 1.0, out_dtype)
    out = out[..., 0] if column else out
    return out[..., 0] if row and column else out[..., 0, :] if row else out


def linear(input: jax.Array, weight: jax.Array, bias: jax.Array | None = None, *, out_dtype: Any = None) -> jax.Array:
    """input [*, K] @ weight [N, K]^T + bias [N] -> [*, N], rounded once to the output dtype."""
    x, weight = _arrays("linear", input=input, weight=weight)
    if x.ndim == 0 or weight.ndim != 2:
        raise ValueError(f"bi_jax.linear: input must be [*, K] and weight [N, K], got {x.shape} and {weight.shape}")
    if bias is not None:
        (bias,) = _arrays("linear", bias=bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bi_jax.linear: bias must be [N] = {weight.shape[:1]}, got {bias.shape}")
    out = _run("linear", x[None] if x.ndim == 1 else x, weight, bias, 1.0, 1.0, out_dtype, transpose_rhs=True)
    return out[0] if x.ndim == 1 else out


def _run(
    op: str,
    a: jax.Array,
    b: jax.Array,
    bias: jax.Array | None,
    alpha: float,
    beta: float,
    out_dtype: Any,
    *,
    transpose_rhs: bool = False,
) -> jax.Array:
    """Check what every op has in common and compute."""
    k, n = b.shape[:-3:-1] if transpose_rhs else b.shape[-2:]
    if a.shape[-1] != k:
        raise ValueError(f"bi_jax.{op}: the reduced extents differ: {a.shape} and {b.shape}")
    if a.dtype.name not in DTYPES or a.dtype != b.dtype:
        raise TypeError(f"bi_jax.{op}: operands must share one dtype of {', '.join(DTYPES)}, got {a.dtype} and {b.dtype}")
    try:
        batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(f"bi_jax.{op}: batch dimensions do not broadcast: {a.shape} and {b.shape}") from None
    out_dtype = _out_dtype(op, a.dtype, out_dtype)
    alpha, beta = _number(op, "alpha", alpha), _number(op, "beta", beta)
    if bias is not None:
        _check_bias(op, bias, a.dtype, (*batch, a.shape[-2], n))
    return product(a, b, None if beta == 0 else bias, Params(alpha, beta, out_dtype, transpose_rhs=transpose_rhs))


def _check_bias(op: str, bias: jax.Array, dtype: Any, shape: tuple[int, ...]) -> None:
    if bias.dtype not in (dtype, jnp.float32):
        raise TypeError(f"bi_jax.{op}: bias must be {dtype} or float32, got {bias.dtype}")
    padded = (1,) * (len(shape) - bias.ndim) + bias.shape
    if len(padded) != len(shape) or any(own not in (1, size) for own, size in zip(padded, shape, strict=True)):
        raise ValueError(f"bi_jax.{op}: bias {bias.shape} does not broadcast to {shape}")


def _out_dtype(op: str, operand: Any, out_dtype: Any) -> Any:
    if out_dtype is None:
        return operand
    for allowed in (operand, jnp.dtype("float32")):
        with contextlib.suppress(TypeError):
            if jnp.dtype(out_dtype) == allowed:
                return allowed
    raise TypeError(f"bi_jax.{op}: out_dtype must be {operand} or float32, got {out_dtype}")


def _number(op: str, name: str, value: float) -> float:
    """`value` rounded to float32."""
    if not isinstance(value, int | float | np.number):
        raise TypeError(f"bi_jax.{op}: {name} must be a number that is known when tracing, got {type(value).__name__}")
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _arrays(op: str, **arguments: Any) -> tuple[jax.Array, ...]:
    for name, x in arguments.items():
        if not isinstance(x, jax.Array | np.ndarray):
            raise TypeError(f"bi_jax.{op}: {name} must be an array, got {type(x).__name__}")
        if x.dtype.name not in DTYPES:
            raise TypeError(f"bi_jax.{op}: {name} must be one of {', '.join(DTYPES)}, got {x.dtype}")
    return tuple(jnp.asarray(x) for x in arguments.values())


def _check_dims(op: str, dims: int, **arrays: jax.Array) -> None:
    for name, x in arrays.items():
        if x.ndim != dims:
            raise ValueError(f"bi_jax.{op}: {name} must have {dims} dimensions, got {x.shape}")


def _check_batches(op: str, a: jax.Array, b: jax.Array) -> None:
    _check_dims(op, 3, a=a, b=b)
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"bi_jax.{op}: the batch sizes differ: {a.shape} and {b.shape}")
