"""layer_norm, rms_norm and fused_add_rms_norm over trailing dimensions.

Weights and biases have the input's dtype or float32. Their gradients are sums over the rows, in the order of the rows.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import jax
import jax.numpy as jnp

from bi_jax.rows.arguments import array, check_number, check_shape, from_rows, to_rows
from bi_jax.rows.op import row_op
from shared_specs.programs import norm as programs

_layer_norm_backward = row_op("layer_norm", lambda e: programs.layer_norm_backward(weight=e.weight is not None))
_layer_norm_weight = row_op("layer_norm", programs.layer_norm_parameters(weight=True, bias=False))
_layer_norm_bias = row_op("layer_norm", programs.layer_norm_parameters(weight=False, bias=True))


def _layer_norm_gradient(s: SimpleNamespace, g: SimpleNamespace) -> dict[str, jax.Array]:
    gradients = {}
    if "x" in s.needs:
        gradients["x"] = _layer_norm_backward(s.x.dtype, x=s.x, g=g.y, weight=s.weight, mean=s.mean, rstd=s.rstd).dx
    if "weight" in s.needs:
        gradients["weight"] = _layer_norm_weight(s.dtypes["weight"], x=s.x, g=g.y, mean=s.mean, rstd=s.rstd).dweight
    if "bias" in s.needs:
        gradients["bias"] = _layer_norm_bias(s.dtypes["bias"], g=g.y).dbias
    return gradients


_layer_norm = row_op(
    "layer_norm",
    lambda e: programs.layer_norm(weight=e.weight is not None, bias=e.bias is not None),
    keep=("x", "weight", "mean", "rstd"),
    gradient=_layer_norm_gradient,
)

_rms_norm_backward = row_op(
    "rms_norm", lambda e: programs.rms_norm_backward(weight=e.weight is not None, residual=e.dh is not None)
)
_rms_norm_parameters = row_op("rms_norm", programs.RMS_NORM_PARAMETERS)


def _rms_norm_gradient(s: SimpleNamespace, g: SimpleNamespace) -> dict[str, jax.Array]:
    gradients = {}
    if "x" in s.needs:
        gradients["x"] = _rms_norm_backward(s.x.dtype, x=s.x, g=g.y, dh=None, weight=s.weight, rstd=s.rstd).dx
    if "weight" in s.needs:
        gradients["weight"] = _rms_norm_parameters(s.dtypes["weight"], x=s.x, g=g.y, rstd=s.rstd).dweight
    return gradients


_rms_norm = row_op(
    "rms_norm",
    lambda e: programs.rms_norm(weight=e.weight is not None),
    keep=("x", "weight", "rstd"),
    gradient=_rms_norm_gradient,
)


def _fused_add_rms_norm_gradient(s: SimpleNamespace, g: SimpleNamespace) -> dict[str, jax.Array]:
    gradients = {}
    if s.needs & {"x", "residual"}:
        dx = _rms_norm_backward(s.h.dtype, x=s.h, g=g.y, dh=g.h, weight=s.weight, rstd=s.rstd).dx
        gradients = {"x": dx, "residual": dx}
    if "weight" in s.needs:
        gradients["weight"] = _rms_norm_parameters(s.dtypes["weight"], x=s.h, g=g.y, rstd=s.rstd).dweight
    return gradients


_fused_add_rms_norm = row_op(
    "fused_add_rms_norm",
    lambda e: programs.fused_add_rms_norm(e.weight is not None, e.dtype.name),
    keep=("h", "weight", "rstd"),
    gradient=_fused_add_rms_norm_gradient,
)


def layer_norm(
    input: jax.Array,
    normalized_shape: Sequence[int],
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float | jax.Array = 1e-5,
) -> jax.Array:
    """(input - mean) / sqrt(variance + eps) * weight + bias over the trailing dimensions `normalized_shape`."""
    x = array("layer_norm", "input", input)
    dims = _trailing("layer_norm", x, normalized_shape)
    columns = {name: _column("layer_norm", name, c, x, normalized_shape) for name, c in (("weight", weight), ("bias", bias))}
    check_number("layer_norm", "eps", eps, 0)
    return from_rows(_layer_norm(x.dtype, x=to_rows(x, dims), **columns, eps=eps).y, x, dims)


def rms_norm(
    input: jax.Array,
    normalized_shape: Sequence[int],
    weight: jax.Array | None = None,
    eps: float | jax.Array | None = None,
) -> jax.Array:
    """input / sqrt(mean of squares + eps) * weight over the trailing dimensions; eps is the dtype's epsilon by default."""
    x = array("rms_norm", "input", input)
    dims = _trailing("rms_norm", x, normalized_shape)
    column = _column("rms_norm", "weight", weight, x, normalized_shape)
    eps = float(jnp.finfo(x.dtype).eps) if eps is None else eps
    check_number("rms_norm", "eps", eps, 0)
    return from_rows(_rms_norm(x.dtype, x=to_rows(x, dims), weight=column, eps=eps).y, x, dims)


def fused_add_rms_norm(
    input: jax.Array, residual: jax.Array, weight: jax.Array | None = None, eps: float | jax.Array = 1e-6
) -> tuple[jax.Array, jax.Array]:
    """(rms_norm(h), h) over the last dimension, where h = input + residual, rounded to their dtype.

    The bits are those of an addition followed by `rms_norm`.
    """
    x = array("fused_add_rms_norm", "input", input)
    residual = array("fused_add_rms_norm", "residual", residual, (x.dtype.name,))
    check_shape("fused_add_rms_norm", "residual", residual, x.shape)
    dims = _trailing("fused_add_rms_norm", x, x.shape[-1:])
    column = _column("fused_add_rms_norm", "weight", weight, x, x.shape[-1:])
    check_number("fused_add_rms_norm", "eps", eps, 0)
    out = _fused_add_rms_norm(x.dtype, x=to_rows(x, dims), residual=to_rows(residual, dims), weight=column, eps=eps)
    return from_rows(out.y, x, dims), from_rows(out.h, x, dims)


def _trailing(op: str, x: jax.Array, normalized_shape: Sequence[int]) -> tuple[int, ...]:
    """The trailing dimensions of `x` that `normalized_shape` describes."""
    if isinstance(normalized_shape, int):
        raise TypeError(f"bi_jax.{op}: normalized_shape must be a sequence of int, got int")
    shape = tuple(normalized_shape)
    if not shape:
        raise ValueError(f"bi_jax.{op}: normalized_shape must have at least one dimension, got input {x.shape}")
    if x.shape[-len(shape) :] != shape:
        raise ValueError(f"bi_jax.{op}: input must have shape [*, {', '.join(map(str, shape))}], got {x.shape}")
    return tuple(range(x.ndim - len(shape), x.ndim))


def _column(op: str, name: str, column: jax.Array | None, x: jax.Array, shape: Sequence[int]) -> jax.Array | None:
    """A weight or bias as one row."""
    if column is None:
        return None
    column = array(op, name, column, tuple(dict.fromkeys((x.dtype.name, "float32"))))
    check_shape(op, name, column, shape)
    return column.reshape(column.size)
