"""Reductions of floating-point tensors, and softmax."""

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
    Override("softmax.int", softmax_int, out="softmax.int_out"),
    Override("log_softmax.int", log_softmax_int, out="log_softmax.int_out"),
    Override("_softmax", softmax_data, out="_softmax.out"),
    Override("_log_softmax", log_softmax_data, out="_log_softmax.out"),
)
