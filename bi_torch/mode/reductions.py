"""Reductions of floating-point tensors, and softmax."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bi_torch.mode.override import Function, Override, write
from bi_torch.rows import reduce, softmax
from bi_torch.rows.arguments import FLOATS

Dims = Sequence[int] | None


def _is_ours(x: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether the contract has the dtype of the result, and exactly represents that of the input, or rounds it to float32."""
    if dtype is None or x.dtype in FLOATS:
        return x.dtype in FLOATS and (dtype is None or dtype in FLOATS)
    return x.dtype in reduce.INTEGERS and dtype in FLOATS


def sum_dim(self: Tensor, dim: Dims, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """The sum over dimensions."""
    return reduce.sum(self, dim, keepdim, dtype=dtype) if _is_ours(self, dtype) else NotImplemented


def sum_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    """The sum of all elements."""
    return sum_dim(self, None, dtype=dtype)


def mean_dim(self: Tensor, dim: Dims, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """The mean over dimensions."""
    return reduce.mean(self, dim, keepdim, dtype=dtype) if _is_ours(self, dtype) else NotImplemented


def mean_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    """The mean of all elements."""
    return mean_dim(self, None, dtype=dtype)


def nansum(self: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """The sum over dimensions, NaN counted as 0."""
    return sum_dim(self.masked_fill(self.isnan(), 0), dim, keepdim, dtype=dtype) if _is_ours(self, dtype) else NotImplemented


def prod_dim(self: Tensor, dim: int | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """The product over a dimension."""
    return reduce.prod(self, dim, keepdim, dtype=dtype) if _is_ours(self, dtype) else NotImplemented


def prod_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    """The product of all elements."""
    return prod_dim(self, None, dtype=dtype)


def var(self: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    """The variance over dimensions."""
    return reduce.var(self, dim, correction=correction, keepdim=keepdim) if self.dtype in FLOATS else NotImplemented


def std(self: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    """The standard deviation over dimensions."""
    return reduce.std(self, dim, correction=correction, keepdim=keepdim) if self.dtype in FLOATS else NotImplemented


def var_mean(self: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    """The variance and the mean over dimensions."""
    if self.dtype not in FLOATS:
        return NotImplemented
    return reduce.var(self, dim, correction=correction, keepdim=keepdim), reduce.mean(self, dim, keepdim)


def std_mean(self: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    """The standard deviation and the mean over dimensions."""
    if self.dtype not in FLOATS:
        return NotImplemented
    return reduce.std(self, dim, correction=correction, keepdim=keepdim), reduce.mean(self, dim, keepdim)


def vector_norm(
    self: Tensor, ord: float = 2, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """(sum of |self| ** ord) ** (1 / ord), or the limit of that, in float32."""
    if self.dtype not in FLOATS or (dtype or self.dtype) not in FLOATS:
        return NotImplemented
    if ord == 2:
        return reduce.norm(self, dim, keepdim, dtype=dtype)
    if ord == 1:
        return reduce.sum(self.abs(), dim, keepdim, dtype=dtype)
    if ord == 0:
        nonzero = self.masked_fill(self.isnan(), 1).sign().abs()  # with a gradient, which is 0
        return reduce.sum(nonzero, dim, keepdim, dtype=dtype)
    if abs(ord) == math.inf:
        extreme = reduce.amax if ord > 0 else reduce.amin
        return extreme(self.abs(), () if dim is None else dim, keepdim).to(dtype or self.dtype)
    powers = self.abs().to(torch.float32).pow(ord)
    return reduce.sum(powers, dim, keepdim).pow(1 / ord).to(dtype or self.dtype)


def norm_scalar(self: Tensor, p: float = 2) -> Any:
    """The norm of all elements."""
    return vector_norm(self, p)


def norm_dtype(self: Tensor, p: float | None, *, dtype: torch.dtype) -> Any:
    """The norm of all elements, in a dtype."""
    return vector_norm(self, 2 if p is None else p, dtype=dtype)


def norm_dim(self: Tensor, p: float | None, dim: Dims, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """The norm over dimensions."""
    return vector_norm(self, 2 if p is None else p, dim, keepdim, dtype=dtype)


def foreach_norm(self: Sequence[Tensor], ord: float = 2, dtype: torch.dtype | None = None) -> Any:
    """The norm of each tensor."""
    norms = [vector_norm(x, ord, dtype=dtype) for x in self]
    return NotImplemented if any(x is NotImplemented for x in norms) else norms


def logsumexp(self: Tensor, dim: Dims, keepdim: bool = False) -> Any:
    """log(sum(exp(self))) over dimensions."""
    return reduce.logsumexp(self, dim, keepdim) if self.dtype in FLOATS else NotImplemented


def amax(self: Tensor, dim: Dims = (), keepdim: bool = False) -> Any:
    """The largest element over dimensions."""
    return reduce.amax(self, dim, keepdim) if self.dtype in FLOATS else NotImplemented


def amin(self: Tensor, dim: Dims = (), keepdim: bool = False) -> Any:
    """The smallest element over dimensions."""
    return reduce.amin(self, dim, keepdim) if self.dtype in FLOATS else NotImplemented


def aminmax(self: Tensor, *, dim: int | None = None, keepdim: bool = False) -> Any:
    """The smallest and the largest element over a dimension."""
    if self.dtype not in FLOATS:
        return NotImplemented
    dims = () if dim is None else (dim,)
    return reduce.amin(self, dims, keepdim), reduce.amax(self, dims, keepdim)


def max_all(self: Tensor) -> Any:
    """The largest element."""
    return amax(self)


def min_all(self: Tensor) -> Any:
    """The smallest element."""
    return amin(self)


def softmax_int(self: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """softmax over one dimension."""
    return softmax.softmax(self, dim, dtype).contiguous() if _is_ours(self, dtype) else NotImplemented


def log_softmax_int(self: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """log_softmax over one dimension."""
    return softmax.log_softmax(self, dim, dtype).contiguous() if _is_ours(self, dtype) else NotImplemented


def softmax_data(self: Tensor, dim: int, half_to_float: bool) -> Any:
    """What softmax calls, with the dtype of the result as a flag."""
    return softmax_int(self, dim, torch.float32 if half_to_float else None)


def log_softmax_data(self: Tensor, dim: int, half_to_float: bool) -> Any:
    """What log_softmax calls, with the dtype of the result as a flag."""
    return log_softmax_int(self, dim, torch.float32 if half_to_float else None)


def softmax_backward(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Any:
    """The gradient of softmax from its output."""
    if output.dtype not in FLOATS:
        return NotImplemented
    return softmax.softmax_backward(grad_output, output, dim, input_dtype).contiguous()


def log_softmax_backward(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Any:
    """The gradient of log_softmax from its output."""
    if output.dtype not in FLOATS:
        return NotImplemented
    return softmax.log_softmax_backward(grad_output, output, dim, input_dtype).contiguous()


def safe_softmax(self: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """softmax over one dimension, 0 where all of it is -inf."""
    if not _is_ours(self, dtype):
        return NotImplemented
    empty = (self == -math.inf).all(dim, keepdim=True)
    return softmax_int(self, dim, dtype).masked_fill(empty, 0)


def _in_dtype_of_out(function: Function) -> Function:
    """The form with `out`: without a dtype, the result is rounded to that of `out` alone."""

    def run(*args: Any, dtype: torch.dtype | None = None, out: Tensor) -> Any:
        result = function(*args, dtype=dtype or out.dtype)
        if result is not NotImplemented:
            write(out, result)
        return result if result is NotImplemented else out

    return run


def _with_dtype(name: str, function: Function, out: str) -> Override:
    return Override(name, function, out=out, write=_in_dtype_of_out(function))


OVERRIDES = (
    _with_dtype("sum", sum_all, "sum.out"),
    _with_dtype("sum.dim_IntList", sum_dim, "sum.IntList_out"),
    _with_dtype("mean", mean_all, "mean.dtype_out"),
    _with_dtype("mean.dim", mean_dim, "mean.out"),
    _with_dtype("nansum", nansum, "nansum.out"),
    _with_dtype("prod", prod_all, "prod.out"),
    _with_dtype("prod.dim_int", prod_dim, "prod.int_out"),
    Override("var.correction", var, out="var.correction_out"),
    Override("std.correction", std, out="std.correction_out"),
    Override("var_mean.correction", var_mean, out="var_mean.correction_out"),
    Override("std_mean.correction", std_mean, out="std_mean.correction_out"),
    Override("linalg_vector_norm", vector_norm, out="linalg_vector_norm.out"),
    Override("norm.Scalar", norm_scalar, out="norm.Scalar_out"),
    Override("norm.ScalarOpt_dtype", norm_dtype, out="norm.ScalarOpt_dtype_out"),
    Override("norm.ScalarOpt_dim", norm_dim, out="norm.out"),
    Override("norm.ScalarOpt_dim_dtype", norm_dim, out="norm.dtype_out"),
    Override("_foreach_norm.Scalar", foreach_norm),
    Override("logsumexp", logsumexp, out="logsumexp.out"),
    Override("amax", amax, out="amax.out", exact=True),
    Override("amin", amin, out="amin.out", exact=True),
    Override("aminmax", aminmax, out="aminmax.out", exact=True),
    Override("max", max_all, out="max.unary_out", exact=True),
    Override("min", min_all, out="min.unary_out", exact=True),
    Override("softmax.int", softmax_int, out="softmax.int_out"),
    Override("log_softmax.int", log_softmax_int, out="log_softmax.int_out"),
    Override("_softmax", softmax_data, out="_softmax.out"),
    Override("_log_softmax", log_softmax_data, out="_log_softmax.out"),
    Override("_safe_softmax", safe_softmax),
    Override("_softmax_backward_data", softmax_backward, out="_softmax_backward_data.out", autograd=False),
    Override("_log_softmax_backward_data", log_softmax_backward, out="_log_softmax_backward_data.out", autograd=False),
)
