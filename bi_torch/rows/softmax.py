"""softmax, log_softmax, token_logprobs and cross_entropy.

All use one sum of exponentials a row; so token_logprobs has the bits of log_softmax followed by a gather.
"""

from typing import Literal

import torch
from torch import Tensor

from bi_torch.rows.arguments import FLOATS, IDS, check_dtype, check_shape, check_tensor, dims_of, from_rows, to_rows
from bi_torch.rows.library import Op, RowOp
from bi_torch.rows.reduce import INTEGERS
from bi_torch.rows.reduce import sum as sum_over
from shared_specs.programs import reduce as reduce_programs
from shared_specs.programs import softmax as programs

_softmax_backward = RowOp("softmax_backward(Tensor y, Tensor g, ScalarType dtype) -> Tensor dx", programs.SOFTMAX_BACKWARD)
_softmax = RowOp(
    "softmax(Tensor x, ScalarType dtype) -> Tensor y",
    programs.SOFTMAX,
    keep=("y",),
    gradient=lambda s, g: {"x": _softmax_backward(s.y, g.y, s.dtypes["x"])},
)

_log_softmax_backward = RowOp(
    "log_softmax_backward(Tensor y, Tensor g, ScalarType dtype) -> Tensor dx", programs.LOG_SOFTMAX_BACKWARD
)
_log_softmax = RowOp(
    "log_softmax(Tensor x, ScalarType dtype) -> Tensor y",
    programs.LOG_SOFTMAX,
    keep=("y",),
    gradient=lambda s, g: {"x": _log_softmax_backward(s.y, g.y, s.dtypes["x"])},
)


def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """exp(input) / sum(exp(input)) over `dim`; float32 inside, rounded once to `dtype`, the input's by default."""
    return _over_dim("softmax", _softmax, input, dim, dtype)


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """The logarithm of softmax, without its rounding; dtypes as in `softmax`."""
    return _over_dim("log_softmax", _log_softmax, input, dim, dtype)


def _over_dim(name: str, op: RowOp, input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    check_tensor(name, "input", input, FLOATS if dtype is None else FLOATS + INTEGERS)
    if not isinstance(dim, int):
        raise TypeError(f"bi_torch.{name}: dim must be int, got {type(dim).__name__}")
    dims = dims_of(name, input, dim)
    dtype = dtype or input.dtype
    check_dtype(name, dtype)
    return op.on_views(
        (input, dtype),
        lambda: (to_rows(input if input.dtype in FLOATS else input.to(torch.float32), dims), dtype),
        lambda y: from_rows(y, input, dims),
        dims,
    )


def softmax_backward(g: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The gradient of `softmax` over `dim` from its output y and the cotangent g."""
    return _gradient_over_dim("softmax_backward", _softmax_backward, g, y, dim, dtype)


def log_softmax_backward(g: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The gradient of `log_softmax` over `dim` from its output y and the cotangent g."""
    return _gradient_over_dim("log_softmax_backward", _log_softmax_backward, g, y, dim, dtype)


def _gradient_over_dim(name: str, op: RowOp, g: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    check_tensor(name, "y", y)
    check_tensor(name, "g", g, like=y)
    check_shape(name, "g", g, y.shape)
    dims = dims_of(name, y, dim)
    return op.on_views(
        (y, g, dtype), lambda: (to_rows(y, dims), to_rows(g, dims), dtype), lambda dx: from_rows(dx, y, dims), dims
    )


_token_logprobs_backward = RowOp(
    "token_logprobs_backward(Tensor x, Tensor id, Tensor g, Tensor max, Tensor log_sum, float? temperature, ScalarType dtype)"
    " -> Tensor dx",
    lambda e: programs.token_logprobs_backward(e.temperature is not None),
)
_token_logprobs = RowOp(
    "token_logprobs(Tensor x, Tensor id, float? temperature) -> (Tensor y, Tensor max, Tensor log_sum)",
    lambda e: programs.token_logprobs(e.temperature is not None),
    keep=("x", "id", "max", "log_sum"),
    gradient=lambda s, g: {"x": _token_logprobs_backward(s.x, s.id, g.y, s.max, s.log_sum, s.temperature, s.x.dtype)},
)


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float | None = None) -> Tensor:
    """log_softmax(logits / temperature) [*, V] in float32 at one id [*] a row, in one pass; an id outside 0..V-1 gives NaN."""
    check_tensor("token_logprobs", "logits", logits)
    check_tensor("token_logprobs", "ids", ids, IDS, like=logits)
    if not logits.dim():
        raise RuntimeError("bi_torch.token_logprobs: logits must have at least one dimension, got []")
    check_shape("token_logprobs", "ids", ids, logits.shape[:-1])
    if temperature is not None and not temperature > 0:
        raise ValueError(f"bi_torch.token_logprobs: temperature must be positive, got {temperature}")
    x = to_rows(logits, (logits.dim() - 1,))
    y, _, _ = _token_logprobs(x, ids.reshape(x.shape[0]), None if temperature is None else float(temperature))
    return y.reshape(ids.shape)


_cross_entropy_backward = RowOp(
    "cross_entropy_backward(Tensor x, Tensor id, Tensor g, Tensor max, Tensor log_sum, float smoothing, int ignore_index,"
    " ScalarType dtype) -> Tensor dx",
    lambda e: programs.cross_entropy_backward(e.smoothing > 0),
)
_cross_entropy = RowOp(
    "cross_entropy(Tensor x, Tensor id, float smoothing, int ignore_index, ScalarType dtype)"
    " -> (Tensor y, Tensor max, Tensor log_sum)",
    lambda e: programs.cross_entropy(e.smoothing > 0),
    keep=("x", "id", "max", "log_sum"),
    gradient=lambda s, g: {
        "x": _cross_entropy_backward(s.x, s.id, g.y, s.max, s.log_sum, s.smoothing, s.ignore_index, s.x.dtype)
    },
)

_mean_of_backward = RowOp(
    "mean_of_backward(Tensor like, Tensor g, Tensor divisor, ScalarType dtype) -> Tensor dx", reduce_programs.MEAN_OF_BACKWARD
)
_mean_of = RowOp(
    "mean_of(Tensor x, Tensor divisor, ScalarType dtype) -> Tensor y",
    reduce_programs.MEAN_OF,
    keep=("x", "divisor"),
    gradient=lambda s, g: {"x": _mean_of_backward(s.x, g.y, s.divisor, s.x.dtype)},
)


_choice_backward = RowOp(
    "choice_backward(Tensor like, Tensor id, Tensor g, ScalarType dtype) -> Tensor dx", reduce_programs.CHOICE_BACKWARD
)


def _choose(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ids.to(torch.int64)[:, None])[:, 0]


_choice = Op(
    "choice(Tensor x, Tensor id) -> Tensor y",
    cpu=_choose,
    cuda=_choose,
    fake=lambda x, ids: x.new_empty(x.shape[:1]),
    keep=("x", "id"),
    gradient=lambda s, g: {"x": _choice_backward(s.x, s.id, g.y, s.x.dtype)},
)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> tuple[Tensor, Tensor]:
    """-input at the class `target`, times the class's weight, and the sum of these weights, float32.

    input [N, C], [C] or [N, C, *], target [N], [] or [N, *], weight [C]. A target that is `ignore_index` has loss 0 and weight
    0; any other is within 0..C-1. Losses are float32 until they are reduced, and rounded once to the input's dtype; the mean is
    their sum divided by that of the weights.
    """
    check_tensor("nll_loss", "input", input)
    check_tensor("nll_loss", "target", target, IDS, like=input)
    if not input.dim():
        raise RuntimeError("bi_torch.nll_loss: input must have at least one dimension, got []")
    dims = (min(1, input.dim() - 1),)
    check_shape("nll_loss", "target", target, [n for d, n in enumerate(input.shape) if d not in dims])
    x = to_rows(input, dims)
    ids, ignored, weights = _classes("nll_loss", x, target, weight, ignore_index)
    losses = -_choice(x, ids).to(torch.float32)
    if weight is not None:
        losses = losses * weights
    losses = torch.where(ignored, 0.0, losses)
    total = sum_over(weights)
    if reduction == "none":
        return losses.to(input.dtype).reshape(target.shape), total
    if reduction == "sum":
        return sum_over(losses, dtype=input.dtype), total
    return _mean_of(losses[None], total[None], input.dtype)[0], total


def nll_loss_backward(
    g: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, divisor: Tensor | None
) -> Tensor:
    """The gradient of `nll_loss` from the cotangent g, which is divided by the sum of the weights for a mean."""
    dims = (min(1, input.dim() - 1),)
    x = to_rows(input, dims)
    ids, ignored, weights = _classes("nll_loss_backward", x, target, weight, ignore_index)
    cotangents = g.to(torch.float32)
    if divisor is not None:
        cotangents = cotangents / divisor.to(torch.float32)
    cotangents = cotangents.expand(target.shape).reshape(x.shape[0])
    losses = torch.where(ignored, 0.0, -(cotangents * weights))
    return from_rows(_choice_backward(x, ids, losses, input.dtype), input, dims).contiguous()


def _classes(op: str, x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row: the class, or 0 where it is ignored, whether it is, and the weight."""
    ids = target.reshape(x.shape[0])
    ignored = ids == ignore_index
    ids = torch.where(ignored, 0, ids)
    weights = (~ignored).to(torch.float32)
    if weight is not None:
        check_tensor(op, "weight", weight, like=x)
        check_shape(op, "weight", weight, (x.shape[1],))
        weights = weights * weight.detach().to(torch.float32)[ids]
    return ids, ignored, weights


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log_softmax(input) at the class `target`, for input [N, C], [C] or [N, C, *] and target [N], [] or [N, *].

    A target that is `ignore_index` has loss 0 and does not count in the mean; any other outside 0..C-1 has loss NaN. Losses
    are float32 until they are reduced, in the order of `target`, and rounded once to the input's dtype.
    """
    check_tensor("cross_entropy", "input", input)
    check_tensor("cross_entropy", "target", target, IDS, like=input)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"bi_torch.cross_entropy: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"bi_torch.cross_entropy: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if not -(1 << 31) <= ignore_index < 1 << 31:
        raise RuntimeError(f"bi_torch.cross_entropy: ignore_index must fit in int32, got {ignore_index}")
    if not input.dim():
        raise RuntimeError("bi_torch.cross_entropy: input must have at least one dimension, got []")
    dims = (min(1, input.dim() - 1),)
    if input.dim() == 2 and target.dim() == 1 and target.shape[0] != input.shape[0]:
        raise ValueError(f"bi_torch.cross_entropy: input has {input.shape[0]} rows, target {target.shape[0]}")
    check_shape("cross_entropy", "target", target, [n for d, n in enumerate(input.shape) if d not in dims])
    x = to_rows(input, dims)
    ids = target.reshape(x.shape[0])
    dtype = input.dtype if reduction == "none" else torch.float32
    losses, _, _ = _cross_entropy(x, ids, float(label_smoothing), ignore_index, dtype)
    if reduction == "none":
        return losses.reshape(target.shape)
    if reduction == "sum":
        return sum_over(losses, dtype=input.dtype)
    counted = (ids != ignore_index).sum().to(torch.float32)
    return _mean_of(losses[None], counted[None], input.dtype)[0]
