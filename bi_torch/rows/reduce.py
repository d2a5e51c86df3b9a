"""sum, mean, amax, amin, var and logsumexp over any dimensions.

The reduced dimensions make one row, in ascending order, the last one fastest. Sums of integers and bools, and their largest
and smallest elements, are exact in any order and so are torch's own.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from bi_torch.rows.arguments import FLOATS, Dims, check_dtype, check_tensor, dims_of, reduced, to_rows
from bi_torch.rows.library import Op, row_op
from shared_specs.programs import reduce as programs
from shared_specs.programs import softmax as softmax_programs

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_spread = row_op("spread(Tensor like, Tensor g, ScalarType dtype) -> Tensor dx", programs.SPREAD)
_sum = row_op(
    "sum(Tensor x, ScalarType dtype) -> Tensor y",
    programs.SUM,
    keep=("x",),
    gradient=lambda s, g: {"x": _spread(s.x, g.y, s.x.dtype)},
)

_mean_backward = row_op("mean_backward(Tensor like, Tensor g, ScalarType dtype) -> Tensor dx", programs.MEAN_BACKWARD)
_mean = row_op(
    "mean(Tensor x, ScalarType dtype) -> Tensor y",
    programs.MEAN,
    keep=("x",),
    gradient=lambda s, g: {"x": _mean_backward(s.x, g.y, s.x.dtype)},
)

_var_backward = row_op(
    "var_backward(Tensor x, Tensor g, Tensor mean, float correction, ScalarType dtype) -> Tensor dx", programs.VAR_BACKWARD
)
_var = row_op(
    "var(Tensor x, float correction, ScalarType dtype) -> (Tensor y, Tensor mean)",
    programs.VAR,
    keep=("x", "mean"),
    gradient=lambda s, g: {"x": _var_backward(s.x, g.y, s.mean, s.correction, s.x.dtype)},
)

_extreme_backward = row_op(
    "extreme_backward(Tensor x, Tensor g, Tensor y, ScalarType dtype) -> Tensor dx", programs.EXTREME_BACKWARD
)


def _extreme_gradient(s: SimpleNamespace, g: SimpleNamespace) -> dict[str, Tensor]:
    return {"x": _extreme_backward(s.x, g.y, s.y, s.x.dtype)}


_amax = row_op("amax(Tensor x, ScalarType dtype) -> Tensor y", programs.AMAX, keep=("x", "y"), gradient=_extreme_gradient)
_amin = row_op("amin(Tensor x, ScalarType dtype) -> Tensor y", programs.AMIN, keep=("x", "y"), gradient=_extreme_gradient)

_logsumexp_backward = row_op(
    "logsumexp_backward(Tensor x, Tensor g, Tensor y, ScalarType dtype) -> Tensor dx", softmax_programs.LOGSUMEXP_BACKWARD
)
_logsumexp = row_op(
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
    return reduced(_sum(to_rows(_floating(input), dims), dtype), input, dims, keepdim)


def mean(input: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The sum over `dim`, all dimensions by default, divided by the number of elements in float32."""
    check_tensor("mean", "input", input, FLOATS if dtype is None else FLOATS + INTEGERS)
    dims = dims_of("mean", input, dim)
    dtype = dtype or input.dtype
    check_dtype("mean", dtype)
    return reduced(_mean(to_rows(_floating(input), dims), dtype), input, dims, keepdim)


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


def logsumexp(input: Tensor, dim: Dims, keepdim: bool = False) -> Tensor:
    """log(sum(exp(input))) over `dim`. Integers and bools give float32."""
    check_tensor("logsumexp", "input", input, FLOATS + INTEGERS)
    dims, x = dims_of("logsumexp", input, dim), _floating(input)
    return reduced(_logsumexp(to_rows(x, dims), x.dtype), input, dims, keepdim)


def _floating(x: Tensor) -> Tensor:
    """Integers and bools as the nearest float32."""
    return x if x.dtype in FLOATS else x.to(torch.float32)


def _extreme(name: str, op: Op, input: Tensor, dim: Dims, keepdim: bool) -> Tensor:
    check_tensor(name, "input", input, FLOATS + INTEGERS)
    dims = dims_of(name, input, dim)
    if input.dtype in INTEGERS:
        return getattr(torch, name)(input, dims, keepdim)
    if input.numel() == 0 and (empty := [d for d in dims if input.shape[d] == 0]):
        if dim is None or (not isinstance(dim, int) and not len(dim)):
            raise RuntimeError(f"bi_torch.{name}: an empty input has no extreme element; name the dimensions to reduce")
        raise IndexError(f"bi_torch.{name}: expected reduction dim {empty[0]} to have non-zero size")
    return reduced(op(to_rows(input, dims), input.dtype), input, dims, keepdim)
