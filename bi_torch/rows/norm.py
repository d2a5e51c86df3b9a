"""layer_norm, rms_norm and fused_add_rms_norm over trailing dimensions.

Weights and biases have the input's dtype or float32. Their gradients are sums over the rows, in the order of the rows.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bi_torch.rows.arguments import FLOATS, check_shape, check_tensor, from_rows, reduced, to_rows
from bi_torch.rows.library import RowOp
from shared_specs.programs import norm as programs

_column_sum = RowOp("column_sum(Tensor x, ScalarType dtype) -> Tensor y", programs.COLUMN_SUM)

_layer_norm_backward = RowOp(
    "layer_norm_backward(Tensor x, Tensor g, Tensor? weight, Tensor mean, Tensor rstd, ScalarType dtype) -> Tensor dx",
    lambda e: programs.layer_norm_backward(weight=e.weight is not None),
)
_layer_norm_weight = RowOp(
    "layer_norm_weight(Tensor x, Tensor g, Tensor mean, Tensor rstd, ScalarType dtype) -> Tensor dweight",
    programs.layer_norm_parameters(weight=True, bias=False),
)
_layer_norm_parameters = RowOp(
    "layer_norm_parameters(Tensor x, Tensor g, Tensor mean, Tensor rstd, ScalarType dtype) -> (Tensor dweight, Tensor dbias)",
    programs.layer_norm_parameters(weight=True, bias=True),
)


def _layer_norm_gradient(s: SimpleNamespace, g: SimpleNamespace) -> dict[str, Tensor]:
    gradients = {}
    if "x" in s.needs:
        gradients["x"] = _layer_norm_backward(s.x, g.y, s.weight, s.mean, s.rstd, s.x.dtype)
    if {"weight", "bias"} <= s.needs:
        both = _layer_norm_parameters(s.x, g.y, s.mean, s.rstd, s.dtypes["weight"])
        gradients["weight"], gradients["bias"] = both
    elif "weight" in s.needs:
        gradients["weight"] = _layer_norm_weight(s.x, g.y, s.mean, s.rstd, s.dtypes["weight"])
    elif "bias" in s.needs:
        gradients["bias"] = _column_sum(g.y, s.dtypes["bias"])
    return gradients


_layer_norm = RowOp(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) -> (Tensor y, Tensor mean, Tensor rstd)",
    lambda e: programs.layer_norm(weight=e.weight is not None, bias=e.bias is not None),
    keep=("x", "weight", "mean", "rstd"),
    gradient=_layer_norm_gradient,
)

_rms_norm_backward = RowOp(
    "rms_norm_backward(Tensor x, Tensor g, Tensor? dh, Tensor? weight, Tensor rstd, ScalarType dtype) -> Tensor dx",
    lambda e: programs.rms_norm_backward(weight=e.weight is not None, residual=e.dh is not None),
)
_rms_norm_parameters = RowOp(
    "rms_norm_parameters(Tensor x, Tensor g, Tensor rstd, ScalarType dtype) -> Tensor dweight", programs.RMS_NORM_PARAMETERS
)


def _rms_norm_gradient(s: SimpleNamespace, g: SimpleNamespace) -> dict[str, Tensor]:
    gradients = {}
    if "x" in s.needs:
        gradients["x"] = _rms_norm_backward(s.x, g.y, None, s.weight, s.rstd, s.x.dtype)
    if "weight" in s.needs:
        gradients["weight"] = _rms_norm_parameters(s.x, g.y, s.rstd, s.dtypes["weight"])
    return gradients


_rms_norm = RowOp(
    "rms_norm(Tensor x, Tensor? weight, float eps, ScalarType dtype) -> (Tensor y, Tensor rstd)",
    lambda e: programs.rms_norm(weight=e.weight is not None),
    keep=("x", "weight", "rstd"),
    gradient=_rms_norm_gradient,
)


def _fused_add_rms_norm_gradient(s: SimpleNamespace, g: SimpleNamespace) -> dict[str, Tensor]:
    gradients = {}
    if s.needs & {"x", "residual"}:
        gradients["x"] = gradients["residual"] = _rms_norm_backward(s.h, g.y, g.h, s.weight, s.rstd, s.h.dtype)
    if "weight" in s.needs:
        gradients["weight"] = _rms_norm_parameters(s.h, g.y, s.rstd, s.dtypes["weight"])
    return gradients


_fused_add_rms_norm = RowOp(
    "fused_add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, ScalarType dtype)"
    " -> (Tensor y, Tensor h, Tensor rstd)",
    lambda e: programs.fused_add_rms_norm(e.weight is not None, str(e.dtype).removeprefix("torch.")),
    keep=("h", "weight", "rstd"),
    gradient=_fused_add_rms_norm_gradient,
)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(variance + eps) * weight + bias over the trailing dimensions `normalized_shape`."""
    return native_layer_norm(input, normalized_shape, weight, bias, eps)[0]


def native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm`, and the mean and 1 / sqrt(variance + eps) of every row, float32 with 1 for each dimension of the row."""

    def rows() -> tuple[Any, ...]:
        dims = _trailing("layer_norm", input, normalized_shape)
        columns = [_column("layer_norm", name, x, input, normalized_shape) for name, x in (("weight", weight), ("bias", bias))]
        return to_rows(input, dims), *columns, float(eps), input.dtype

    def restored(y: Tensor, *statistics: Tensor) -> tuple[Tensor, ...]:
        dims = _trailing("layer_norm", input, normalized_shape)
        return from_rows(y, input, dims), *(reduced(x, input, dims, True) for x in statistics)

    return _layer_norm.on_views((input, weight, bias, eps, None), rows, restored, _key(normalized_shape))


def native_layer_norm_backward(
    grad: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    needs: set[str],
) -> tuple[Tensor | None, ...]:
    """The gradients of x (the input), weight and bias that `needs` names, from what `native_layer_norm` returned."""
    dims = _trailing("layer_norm", input, normalized_shape)
    column = _column("layer_norm", "weight", weight, input, normalized_shape)
    dtypes = {name: input.dtype if x is None else x.dtype for name, x in (("weight", weight), ("bias", bias))}
    statistics = {"mean": _one_column(mean), "rstd": _one_column(rstd)}
    saved = SimpleNamespace(x=to_rows(input, dims), weight=column, **statistics, dtypes=dtypes, needs=needs)
    gradients = _layer_norm_gradient(saved, SimpleNamespace(y=to_rows(grad, dims)))
    return _shaped(gradients, ("x", "weight", "bias"), input, normalized_shape)


def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """input / sqrt(mean of squares + eps) * weight over the trailing dimensions; eps is the dtype's epsilon by default."""
    return fused_rms_norm(input, normalized_shape, weight, eps)[0]


def fused_rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """`rms_norm`, and 1 / sqrt(mean of squares + eps) of every row, float32 with 1 for each dimension of the row."""
    if eps is None:
        eps = torch.finfo(input.dtype).eps if isinstance(input, Tensor) and input.dtype in FLOATS else 0.0

    def rows() -> tuple[Any, ...]:
        dims = _trailing("rms_norm", input, normalized_shape)
        column = _column("rms_norm", "weight", weight, input, normalized_shape)
        return to_rows(input, dims), column, float(eps), input.dtype

    def restored(y: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
        dims = _trailing("rms_norm", input, normalized_shape)
        return from_rows(y, input, dims), reduced(rstd, input, dims, True)

    return _rms_norm.on_views((input, weight, eps, None), rows, restored, _key(normalized_shape))


def fused_rms_norm_backward(
    grad: Tensor, input: Tensor, normalized_shape: Sequence[int], rstd: Tensor, weight: Tensor | None, needs: set[str]
) -> tuple[Tensor | None, ...]:
    """The gradients of x (the input) and weight that `needs` names, from what `fused_rms_norm` returned."""
    dims = _trailing("rms_norm", input, normalized_shape)
    column = _column("rms_norm", "weight", weight, input, normalized_shape)
    dtypes = {"weight": input.dtype if weight is None else weight.dtype}
    saved = SimpleNamespace(x=to_rows(input, dims), weight=column, rstd=_one_column(rstd), dtypes=dtypes, needs=needs)
    gradients = _rms_norm_gradient(saved, SimpleNamespace(y=to_rows(grad, dims)))
    return _shaped(gradients, ("x", "weight"), input, normalized_shape)


def fused_add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(rms_norm(h), h) over the last dimension, where h = input + residual, rounded to their dtype.

    The bits are those of an addition followed by `rms_norm`.
    """
    check_tensor("fused_add_rms_norm", "input", input)
    check_tensor("fused_add_rms_norm", "residual", residual, (input.dtype,), like=input)
    check_shape("fused_add_rms_norm", "residual", residual, input.shape)
    dims = _trailing("fused_add_rms_norm", input, input.shape[-1:])
    column = _column("fused_add_rms_norm", "weight", weight, input, input.shape[-1:])
    y, h, _ = _fused_add_rms_norm(to_rows(input, dims), to_rows(residual, dims), column, float(eps), input.dtype)
    return from_rows(y, input, dims), from_rows(h, input, dims)


def _key(normalized_shape: Sequence[int]) -> Any:
    return normalized_shape if isinstance(normalized_shape, int) else tuple(normalized_shape)


def _one_column(x: Tensor) -> Tensor:
    return x.reshape(x.numel())


def _shaped(
    gradients: dict[str, Tensor], names: Sequence[str], input: Tensor, normalized_shape: Sequence[int]
) -> tuple[Tensor | None, ...]:
    """Gradients of rows and columns in the shapes of what they belong to."""
    shapes = {name: input.shape if name == "x" else normalized_shape for name in names}
    return tuple(gradients[name].reshape(shapes[name]) if name in gradients else None for name in names)


def _trailing(op: str, input: Tensor, normalized_shape: Sequence[int]) -> tuple[int, ...]:
    """The trailing dimensions of `input` that `normalized_shape` describes."""
    check_tensor(op, "input", input)
    if isinstance(normalized_shape, int):
        raise TypeError(f"bi_torch.{op}: normalized_shape must be a sequence of int, got int")
    shape = tuple(normalized_shape)
    if not shape:
        raise RuntimeError(f"bi_torch.{op}: normalized_shape must have at least one dimension, got []")
    if tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(f"bi_torch.{op}: input must have shape [*, {', '.join(map(str, shape))}], got {list(input.shape)}")
    return tuple(range(input.dim() - len(shape), input.dim()))


def _column(op: str, name: str, x: Tensor | None, input: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A weight or bias as one row."""
    if x is None:
        return None
    check_tensor(op, name, x, (torch.float32,) if input.dtype == torch.float32 else (input.dtype, torch.float32), like=input)
    check_shape(op, name, x, shape)
    return x.reshape(x.numel())
