"""sum, mean, prod, amax, amin, var, std, norms and logsumexp over any dimensions, and the squared error.

The reduced dimensions make one row, in ascending order, the last one fastest. Sums of integers and bools, and their largest
and smallest elements, are exact in any order and so are torch's own.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from bi_torch.rows.arguments import FLOATS, Dims, check_dtype, check_shape, check_tensor, dims_of, reduced, to_rows
from bi_torch.rows.library import RowOp
from shared_specs.programs import reduce as programs
from shared_specs.programs import softmax as softmax_programs

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _shaped_as_x(saved: SimpleNamespace, g: Tensor) -> Tensor:
    """What stands for an input of which the gradient needs the shape: its elements are not read."""
    return g.new_empty(saved.shapes["x"], dtype=saved.dtypes["x"])


_spread = RowOp("spread(Tensor like, Tensor g, ScalarType dtype) -> Tensor dx", programs.SPREAD)
_sum = RowOp(
    "sum(Tensor x, ScalarType dtype) -> Tensor y",
    programs.SUM,
    gradient=lambda s, g: {"x": _spread(_shaped_as_x(s, g.y), g.y, s.dtypes["x"])},
)

_mean_backward = RowOp("mean_backward(Tensor like, Tensor g, ScalarType dtype) -> Tensor dx", programs.MEAN_BACKWARD)
_mean = RowOp(
    "mean(Tensor x, ScalarType dtype) -> Tensor y",
    programs.MEAN,
    gradient=lambda s, g: {"x": _mean_backward(_shaped_as_x(s, g.y), g.y, s.dtypes["x"])},
)

_var_backward = RowOp(
    "var_backward(Tensor x, Tensor g, Tensor mean, float correction, ScalarType dtype) -> Tensor dx", programs.VAR_BACKWARD
)
_var = RowOp(
    "var(Tensor x, float correction, ScalarType dtype) -> (Tensor y, Tensor mean)",
    programs.VAR,
    keep=("x", "mean"),
    gradient=lambda s, g: {"x": _var_backward(s.x, g.y, s.mean, s.correction, s.x.dtype)},
)

_std_backward = RowOp(
    "std_backward(Tensor x, Tensor g, Tensor y, Tensor mean, float correction, ScalarType dtype) -> Tensor dx",
    programs.STD_BACKWARD,
)
_std = RowOp(
    "std(Tensor x, float correction, ScalarType dtype) -> (Tensor y, Tensor mean)",
    programs.STD,
    keep=("x", "y", "mean"),
    gradient=lambda s, g: {"x": _std_backward(s.x, g.y, s.y, s.mean, s.correction, s.x.dtype)},
)

_norm_backward = RowOp("norm_backward(Tensor x, Tensor g, Tensor y, ScalarType dtype) -> Tensor dx", programs.NORM_BACKWARD)
_norm = RowOp(
    "norm(Tensor x, ScalarType dtype) -> Tensor y",
    programs.NORM,
    keep=("x", "y"),
    gradient=lambda s, g: {"x": _norm_backward(s.x, g.y, s.y, s.x.dtype)},
)

_squared_error_backward = RowOp(
    "squared_error_backward(Tensor x, Tensor target, Tensor g, bool mean, ScalarType dtype) -> (Tensor dx, Tensor dtarget)",
    lambda e: programs.squared_error_backward(e.mean),
)
_squared_error = RowOp(
    "squared_error(Tensor x, Tensor target, bool mean, ScalarType dtype) -> Tensor y",
    lambda e: programs.squared_error(e.mean),
    keep=("x", "target"),
    gradient=lambda s, g: dict(
        zip(("x", "target"), _squared_error_backward(s.x, s.target, g.y, s.mean, s.x.dtype), strict=True)
    ),
)

_extreme_backward = RowOp(
    "extreme_backward(Tensor x, Tensor g, Tensor y, ScalarType dtype) -> Tensor dx", programs.EXTREME_BACKWARD
)


def _extreme_gradient(s: SimpleNamespace, g: SimpleNamespace) -> dict[str, Tensor]:
    return {"x": _extreme_backward(s.x, g.y, s.y, s.x.dtype)}


_amax = RowOp("amax(Tensor x, ScalarType dtype) -> Tensor y", programs.AMAX, keep=("x", "y"), gradient=_extreme_gradient)
_amin = RowOp("amin(Tensor x, ScalarType dtype) -> Tensor y", programs.AMIN, keep=("x", "y"), gradient=_extreme_gradient)

_logsumexp_backward = RowOp(
    "logsumexp_backward(Tensor x, Tensor g, Tensor y, ScalarType dtype) -> Tensor dx", softmax_programs.LOGSUMEXP_BACKWARD
)
_logsumexp = RowOp(
    "logsumexp(Tensor x, ScalarType dtype) -> Tensor y",
    softmax_programs.LOGSUMEXP,
    keep=("x", "y"),
    gradient=lambda s, g: {"x": _logsumexp_backward(s.x, g.y, s.y, s.x.dtype)},
)


def sum(  # noqa: A001
    input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The sum over `dim`, all dimensions by default. Integers and bools sum to int64."""
    check_tensor("sum", "input", input, FLOATS + INTEGERS)
    dims = dims_of("sum", input, dim)
    if dtype is None:
        dtype = input.dtype if input.dtype in FLOATS else torch.int64
    if dtype in INTEGERS:
        return torch.sum(input, dims, keepdim, dtype=dtype)
    check_dtype("sum", dtype)
    return _reduce(_sum, input, dims, keepdim, dtype)


def mean(input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The sum over `dim`, all dimensions by default, divided by the number of elements in float32."""
    check_tensor("mean", "input", input, FLOATS if dtype is None else FLOATS + INTEGERS)
    dims = dims_of("mean", input, dim)
    dtype = dtype or input.dtype
    check_dtype("mean", dtype)
    return _reduce(_mean, input, dims, keepdim, dtype)


def amax(input: Tensor, dim: Dims = (), keepdim: bool = False) -> Tensor:
    """The largest element over `dim`, all dimensions by default: NaN if there is one, and +0 is above -0."""
    return _extreme("amax", _amax, input, dim, keepdim)


def amin(input: Tensor, dim: Dims = (), keepdim: bool = False) -> Tensor:
    """The smallest element over `dim`, all dimensions by default: NaN if there is one, and -0 is below +0."""
    return _extreme("amin", _amin, input, dim, keepdim)


def var(input: Tensor, dim: Dims = None, *, correction: float | None = 1, keepdim: bool = False) -> Tensor:
    """The squared differences from the mean over `dim`, summed and divided by max(0, number of elements - correction).

    A correction of None is 1, as in torch.var.
    """
    check_tensor("var", "input", input)
    dims = dims_of("var", input, dim)
    y, _ = _var(to_rows(input, dims), 1.0 if correction is None else float(correction), input.dtype)
    return reduced(y, input, dims, keepdim)


def std(input: Tensor, dim: Dims = None, *, correction: float | None = 1, keepdim: bool = False) -> Tensor:
    """The square root of `var`, rounded once; its gradient is 0 where it is 0."""
    check_tensor("std", "input", input)
    dims = dims_of("std", input, dim)
    y, _ = _std(to_rows(input, dims), 1.0 if correction is None else float(correction), input.dtype)
    return reduced(y, input, dims, keepdim)


def norm(input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The square root of the sum of squares over `dim`, all dimensions by default; its gradient is 0 where it is 0."""
    check_tensor("norm", "input", input)
    dims, dtype = dims_of("norm", input, dim), dtype or input.dtype
    check_dtype("norm", dtype)
    return _reduce(_norm, input, dims, keepdim, dtype)


def prod(input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The product over `dim`, all dimensions by default, by a tree over adjacent elements, float32 and rounded once.

    Elements are multiplied in pairs (0 and 1, 2 and 3, ...), then the products, filled up with 1 where their number is odd. So
    ones behind a row change nothing, and the gradient of an element is the product of the others.
    """
    check_tensor("prod", "input", input, FLOATS + INTEGERS)
    dims = dims_of("prod", input, dim)
    dtype = dtype or input.dtype
    check_dtype("prod", dtype)
    x = to_rows(input, dims).to(torch.float32)
    if not x.shape[1]:
        x = x.new_ones((x.shape[0], 1))
    while x.shape[1] > 1:
        if x.shape[1] % 2:
            x = torch.cat((x, x.new_ones((x.shape[0], 1))), 1)
        x = x[:, 0::2] * x[:, 1::2]
    return reduced(x[:, 0].to(dtype), input, dims, keepdim)


def squared_error(input: Tensor, target: Tensor, mean: bool) -> Tensor:
    """The sum, or the mean, of the squared differences of two tensors of one shape, rounded once to the input's dtype."""
    check_tensor("squared_error", "input", input)
    check_tensor("squared_error", "target", target, (input.dtype,), like=input)
    check_shape("squared_error", "target", target, input.shape)
    dims = tuple(range(input.dim()))
    return reduced(_squared_error(to_rows(input, dims), to_rows(target, dims), mean, input.dtype), input, dims, False)


def logsumexp(input: Tensor, dim: Dims, keepdim: bool = False) -> Tensor:
    """log(sum(exp(input))) over `dim`. Integers and bools give float32."""
    check_tensor("logsumexp", "input", input, FLOATS + INTEGERS)
    dtype = input.dtype if input.dtype in FLOATS else torch.float32
    return _reduce(_logsumexp, input, dims_of("logsumexp", input, dim), keepdim, dtype)


def _floating(x: Tensor) -> Tensor:
    """Integers and bools as the nearest float32."""
    return x if x.dtype in FLOATS else x.to(torch.float32)


def _reduce(op: RowOp, input: Tensor, dims: tuple[int, ...], keepdim: bool, dtype: torch.dtype) -> Tensor:
    """The op over `dims`, in the shape that is left."""
    return op.on_views(
        (input, dtype),
        lambda: (to_rows(_floating(input), dims), dtype),
        lambda y: reduced(y, input, dims, keepdim),
        dims,
        keepdim,
    )


def _extreme(name: str, op: RowOp, input: Tensor, dim: Dims, keepdim: bool) -> Tensor:
    check_tensor(name, "input", input, FLOATS + INTEGERS)
    dims = dims_of(name, input, dim)
    if input.dtype in INTEGERS:
        return getattr(torch, name)(input, dims, keepdim)
    if input.numel() == 0 and (empty := [d for d in dims if input.shape[d] == 0]):
        if dim is None or (not isinstance(dim, int) and not len(dim)):
            raise RuntimeError(f"bi_torch.{name}: an empty input has no extreme element; name the dimensions to reduce")
        raise IndexError(f"bi_torch.{name}: expected reduction dim {empty[0]} to have non-zero size")
    return _reduce(op, input, dims, keepdim, input.dtype)
