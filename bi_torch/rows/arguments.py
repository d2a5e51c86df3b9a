"""Checks of arguments, and tensors of any shape as rows, for the public functions.

Messages name the function, the argument and what it may be; the exceptions are torch's.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
IDS = (torch.int32, torch.int64)

Dims = int | Sequence[int] | None


def check_tensor(op: str, name: str, x: object, dtypes: Sequence[torch.dtype] = FLOATS, like: Tensor | None = None) -> None:
    """A dense tensor of one of `dtypes`, on a device with kernels, which is that of `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"bi_torch.{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_quantized:
        raise RuntimeError(f"bi_torch.{op}: {name} must be a dense tensor, got layout {x.layout}")
    if x.dtype not in dtypes:
        raise RuntimeError(f"bi_torch.{op}: {name} must be {_any_of(dtypes)}, got {x.dtype}")
    if not (x.is_cuda or x.is_cpu or x.is_meta):
        raise RuntimeError(f"bi_torch.{op}: {name} must be on a CPU or CUDA device, got {x.device}")
    if like is not None and x.device != like.device:
        raise RuntimeError(f"bi_torch.{op}: {name} must be on {like.device}, got {x.device}")


def check_dtype(op: str, dtype: torch.dtype) -> None:
    """A dtype that an output may have."""
    if dtype not in FLOATS:
        raise RuntimeError(f"bi_torch.{op}: dtype must be {_any_of(FLOATS)}, got {dtype}")


def check_shape(op: str, name: str, x: Tensor, shape: Sequence[int]) -> None:
    """Exactly this shape."""
    if tuple(x.shape) != tuple(shape):
        raise RuntimeError(f"bi_torch.{op}: {name} must have shape {list(shape)}, got {list(x.shape)}")


def dims_of(op: str, x: Tensor, dim: Dims) -> tuple[int, ...]:
    """The dimensions that `dim` names, ascending; all for None and ()."""
    if dim is None:
        return tuple(range(x.dim()))
    if type(dim) is int and 0 < -dim <= x.dim():  # most calls
        return (dim + x.dim(),)
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    if not dims:
        return tuple(range(x.dim()))
    extent = max(1, x.dim())  # a tensor without dimensions passes for one of a single element
    found = set()
    for d in dims:
        if not isinstance(d, int) or isinstance(d, bool):
            raise TypeError(f"bi_torch.{op}: dim must be int or a sequence of int, got {type(d).__name__}")
        if not -extent <= d < extent:
            raise IndexError(
                f"bi_torch.{op}: dim out of range (expected to be in range of [{-extent}, {extent - 1}], but got {d})"
            )
        if d % extent in found:
            raise RuntimeError(f"bi_torch.{op}: dim {d % extent} appears multiple times in the list of dims")
        found.add(d % extent)
    return tuple(sorted(found)) if x.dim() else ()


def to_rows(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """[R, N]: the elements of `dims`, in their order in memory of a contiguous tensor, are a row."""
    if x.dim() == 2 and dims == (1,):
        return x
    kept = [d for d in range(x.dim()) if d not in dims]
    shape = math.prod([x.shape[d] for d in kept]), math.prod([x.shape[d] for d in dims])
    order = [*kept, *dims]
    return (x if order == sorted(order) else x.permute(order)).reshape(shape)


def from_rows(rows: Tensor, like: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The inverse of `to_rows`, with the shape of `like`."""
    if like.dim() == 2 and dims == (1,):
        return rows
    order = [*(d for d in range(like.dim()) if d not in dims), *dims]
    x = rows.reshape([like.shape[d] for d in order])
    return x if order == sorted(order) else x.permute([order.index(d) for d in range(like.dim())])


def reduced(values: Tensor, like: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    """One value a row [R], in the shape of `like` without `dims`, or with 1 in their place."""
    if keepdim:
        return values.reshape([1 if d in dims else n for d, n in enumerate(like.shape)])
    return values.reshape([n for d, n in enumerate(like.shape) if d not in dims])


def _any_of(dtypes: Sequence[torch.dtype]) -> str:
    names = [str(dtype) for dtype in dtypes]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
