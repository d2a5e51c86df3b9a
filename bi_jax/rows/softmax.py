"""softmax, log_softmax, token_logprobs and cross_entropy.

All use one sum of exponentials a row; so token_logprobs has the bits of log_softmax followed by a gather.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from bi_jax.rows import reduce
from bi_jax.rows.arguments import (
    FLOATS,
    INTEGERS,
    array,
    check_number,
    check_shape,
    dims_of,
    floating,
    from_rows,
    id_array,
    out_dtype,
    to_rows,
)
from bi_jax.rows.op import Op, row_op
from shared_specs.programs import reduce as reduce_programs
from shared_specs.programs import softmax as programs

_softmax_backward = row_op("softmax", programs.SOFTMAX_BACKWARD)
_softmax = row_op(
    "softmax",
    programs.SOFTMAX,
    keep=("y",),
    gradient=lambda s, g: {"x": _softmax_backward(s.dtypes["x"], y=s.y, g=g.y).dx},
    tangent=lambda s, t: {"y": _softmax_backward(s.dtype, y=s.y, g=t.x).dx},  # the Jacobian is symmetric
)

_log_softmax_backward = row_op("log_softmax", programs.LOG_SOFTMAX_BACKWARD)
_log_softmax = row_op(
    "log_softmax",
    programs.LOG_SOFTMAX,
    keep=("y",),
    gradient=lambda s, g: {"x": _log_softmax_backward(s.dtypes["x"], y=s.y, g=g.y).dx},
)


def softmax(input: jax.Array, dim: int, dtype: Any = None) -> jax.Array:
    """exp(input) / sum(exp(input)) over `dim`; float32 inside, rounded once to `dtype`, the input's by default."""
    return _over_dim("softmax", _softmax, input, dim, dtype)


def log_softmax(input: jax.Array, dim: int, dtype: Any = None) -> jax.Array:
    """The logarithm of softmax, without its rounding; dtypes as in `softmax`."""
    return _over_dim("log_softmax", _log_softmax, input, dim, dtype)


def _over_dim(name: str, op: Op, input: jax.Array, dim: int, dtype: Any) -> jax.Array:
    x = array(name, "input", input, FLOATS if dtype is None else (*FLOATS, *INTEGERS))
    if not isinstance(dim, int):
        raise TypeError(f"bi_jax.{name}: dim must be int, got {type(dim).__name__}")
    dims, dtype = dims_of(name, x, dim), out_dtype(name, dtype, x.dtype)
    return from_rows(op(dtype, x=to_rows(floating(x), dims)).y, x, dims)


_token_logprobs_backward = row_op("token_logprobs", lambda e: programs.token_logprobs_backward(e.temperature is not None))
_token_logprobs = row_op(
    "token_logprobs",
    lambda e: programs.token_logprobs(e.temperature is not None),
    keep=("x", "id", "max", "log_sum", "temperature"),
    gradient=lambda s, g: {
        "x": _token_logprobs_backward(
            s.x.dtype, x=s.x, id=s.id, g=g.y, max=s.max, log_sum=s.log_sum, temperature=s.temperature
        ).dx
    },
)


def token_logprobs(logits: jax.Array, ids: jax.Array, temperature: float | jax.Array | None = None) -> jax.Array:
    """log_softmax(logits / temperature) [*, V] in float32 at one id [*] a row, in one pass; an id outside 0..V-1 gives NaN."""
    logits, ids = array("token_logprobs", "logits", logits), id_array("token_logprobs", "ids", ids)
    if not logits.ndim:
        raise ValueError("bi_jax.token_logprobs: logits must have at least one dimension, got shape ()")
    check_shape("token_logprobs", "ids", ids, logits.shape[:-1])
    if temperature is not None:
        check_number("token_logprobs", "temperature", temperature, 2.0**-149)
    x = to_rows(logits, (logits.ndim - 1,))
    return _token_logprobs(x=x, id=ids.reshape(x.shape[0]), temperature=temperature).y.reshape(ids.shape)


_cross_entropy_backward = row_op("cross_entropy", lambda e: programs.cross_entropy_backward(e.smoothing is not None))
_cross_entropy = row_op(
    "cross_entropy",
    lambda e: programs.cross_entropy(e.smoothing is not None),
    keep=("x", "id", "max", "log_sum", "smoothing", "ignore_index"),
    gradient=lambda s, g: {
        "x": _cross_entropy_backward(
            s.x.dtype,
            x=s.x,
            id=s.id,
            g=g.y,
            max=s.max,
            log_sum=s.log_sum,
            smoothing=s.smoothing,
            ignore_index=s.ignore_index,
        ).dx
    },
)

_mean_of_backward = row_op("cross_entropy", reduce_programs.MEAN_OF_BACKWARD)
_mean_of = row_op(
    "cross_entropy",
    reduce_programs.MEAN_OF,
    keep=("x", "divisor"),
    gradient=lambda s, g: {"x": _mean_of_backward(s.x.dtype, like=s.x, g=g.y, divisor=s.divisor).dx},
)


def cross_entropy(
    input: jax.Array,
    target: jax.Array,
    *,
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
    label_smoothing: float | jax.Array = 0.0,
) -> jax.Array:
    """-log_softmax(input) at the class `target`, for input [N, C], [C] or [N, C, *] and target [N], [] or [N, *].

    A target that is `ignore_index` has loss 0 and does not count in the mean; any other outside 0..C-1 has loss NaN. Losses
    are float32 until they are reduced, in the order of `target`, and rounded once to the input's dtype.
    """
    x, ids = array("cross_entropy", "input", input), id_array("cross_entropy", "target", target)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"bi_jax.cross_entropy: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    check_number("cross_entropy", "label_smoothing", label_smoothing, 0, 1)
    if not isinstance(ignore_index, int) or not -(1 << 31) <= ignore_index < 1 << 31:
        raise ValueError(f"bi_jax.cross_entropy: ignore_index must be an int32, got {ignore_index}")
    if not x.ndim:
        raise ValueError("bi_jax.cross_entropy: input must have at least one dimension, got shape ()")
    dims = (min(1, x.ndim - 1),)
    check_shape("cross_entropy", "target", ids, [n for d, n in enumerate(x.shape) if d not in dims])
    rows, shape = to_rows(x, dims), ids.shape
    ids = ids.reshape(rows.shape[0])
    losses = _cross_entropy(
        x.dtype if reduction == "none" else jnp.float32,
        x=rows,
        id=ids,
        smoothing=None if isinstance(label_smoothing, float | int) and label_smoothing == 0 else label_smoothing,
        ignore_index=ignore_index,
    ).y
    if reduction == "none":
        return losses.reshape(shape)
    if reduction == "sum":
        return reduce.sum(losses, dtype=x.dtype)
    counted = (ids != ignore_index).sum().astype(jnp.float32)
    return _mean_of(x.dtype, x=losses[None], divisor=counted[None]).y[0]
