"""sum, mean, amax, amin, var and logsumexp over any dimensions.

The reduced dimensions make one row, in ascending order, the last one fastest. Sums of integers and bools, and their largest
and smallest elements, are exact in any order and so are jax.numpy's own, with its dtypes.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from bi_jax.rows.arguments import FLOATS, INTEGERS, Dims, array, check_number, dims_of, floating, out_dtype, reduced, to_rows
from bi_jax.rows.op import Op, row_op
from shared_specs.programs import reduce as programs
from shared_specs.programs import softmax as softmax_programs

_spread = row_op("sum", programs.SPREAD)
_sum: Op = row_op(
    "sum",
    programs.SUM,
    keep=("x",),
    gradient=lambda s, g: {"x": _spread(s.x.dtype, like=s.x, g=g.y).dx},
    tangent=lambda s, t: {"y": _sum(s.dtype, x=t.x).y},
)

_mean_backward = row_op("mean", programs.MEAN_BACKWARD)
_mean: Op = row_op(
    "mean",
    programs.MEAN,
    keep=("x",),
    gradient=lambda s, g: {"x": _mean_backward(s.x.dtype, like=s.x, g=g.y).dx},
    tangent=lambda s, t: {"y": _mean(s.dtype, x=t.x).y},
)

_var_backward = row_op("var", programs.VAR_BACKWARD)
_var = row_op(
    "var",
    programs.VAR,
    keep=("x", "mean", "correction"),
    gradient=lambda s, g: {"x": _var_backward(s.x.dtype, x=s.x, g=g.y, mean=s.mean, correction=s.correction).dx},
)

_extreme_backward = row_op("amax", programs.EXTREME_BACKWARD)


def _extreme_gradient(s: SimpleNamespace, g: SimpleNamespace) -> dict[str, jax.Array]:
    return {"x": _extreme_backward(s.x.dtype, x=s.x, g=g.y, y=s.y).dx}


_amax = row_op("amax", programs.AMAX, keep=("x", "y"), gradient=_extreme_gradient)
_amin = row_op("amin", programs.AMIN, keep=("x", "y"), gradient=_extreme_gradient)

_logsumexp_backward = row_op("logsumexp", softmax_programs.LOGSUMEXP_BACKWARD)
_logsumexp = row_op(
    "logsumexp",
    softmax_programs.LOGSUMEXP,
    keep=("x", "y"),
    gradient=lambda s, g: {"x": _logsumexp_backward(s.x.dtype, x=s.x, g=g.y, y=s.y).dx},
)


def sum(  # noqa: A001
    input: jax.Array, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None
) -> jax.Array:
    """The sum over `dim`, all dimensions by default. Integers and bools sum to the dtype that jnp.sum gives them."""
    x = array("sum", "input", input, (*FLOATS, *INTEGERS))
    dims = dims_of("sum", x, dim)
    to_integer = x.dtype.name in INTEGERS if dtype is None else jnp.issubdtype(jnp.dtype(dtype), jnp.integer)
    if to_integer:
        if x.dtype.name in FLOATS:
            raise TypeError(f"bi_jax.sum: dtype must be floating for input of {x.dtype}, got {jnp.dtype(dtype)}")
        return jnp.sum(x, dims, keepdims=keepdim, dtype=dtype)
    dtype = out_dtype("sum", dtype, x.dtype)
    return reduced(_sum(dtype, x=to_rows(floating(x), dims)).y, x, dims, keepdim)


def mean(input: jax.Array, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> jax.Array:
    """The sum over `dim`, all dimensions by default, divided by the number of elements in float32."""
    x = array("mean", "input", input, FLOATS if dtype is None else (*FLOATS, *INTEGERS))
    dims = dims_of("mean", x, dim)
    dtype = out_dtype("mean", dtype, x.dtype)
    return reduced(_mean(dtype, x=to_rows(floating(x), dims)).y, x, dims, keepdim)


def amax(input: jax.Array, dim: Dims = (), keepdim: bool = False) -> jax.Array:
    """The largest element over `dim`, all dimensions by default: NaN if there is one, and +0 is above -0."""
    return _extreme("amax", _amax, input, dim, keepdim)


def amin(input: jax.Array, dim: Dims = (), keepdim: bool = False) -> jax.Array:
    """The smallest element over `dim`, all dimensions by default: NaN if there is one, and -0 is below +0."""
    return _extreme("amin", _amin, input, dim, keepdim)


def var(input: jax.Array, dim: Dims = None, *, correction: float = 1, keepdim: bool = False) -> jax.Array:
    """The squared differences from the mean over `dim`, summed and divided by max(0, number of elements - correction)."""
    x = array("var", "input", input)
    check_number("var", "correction", correction, float("-inf"))
    dims = dims_of("var", x, dim)
    return reduced(_var(x.dtype, x=to_rows(x, dims), correction=correction).y, x, dims, keepdim)


def logsumexp(input: jax.Array, dim: Dims, keepdim: bool = False) -> jax.Array:
    """log(sum(exp(input))) over `dim`. Integers and bools give float32."""
    x = floating(array("logsumexp", "input", input, (*FLOATS, *INTEGERS)))
    dims = dims_of("logsumexp", x, dim)
    return reduced(_logsumexp(x.dtype, x=to_rows(x, dims)).y, x, dims, keepdim)


def _extreme(name: str, op: Op, input: jax.Array, dim: Dims, keepdim: bool) -> jax.Array:
    x = array(name, "input", input, (*FLOATS, *INTEGERS))
    dims = dims_of(name, x, dim)
    if x.size == 0 and any(x.shape[d] == 0 for d in dims):
        raise ValueError(f"bi_jax.{name}: the reduced dimensions {dims} must not be empty, got shape {x.shape}")
    if x.dtype.name in INTEGERS:
        return getattr(jnp, name)(x, dims, keepdims=keepdim)
    return reduced(op(x.dtype, x=to_rows(x, dims)).y, x, dims, keepdim)
