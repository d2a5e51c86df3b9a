"""The public GEMM functions. Each has the bits that the contract fixes for its operand dtype, on CPU and CUDA alike.

Operands are bfloat16, float16 or float32 and share one dtype; the output has that dtype, or float32 if `out_dtype`
says so. A bias has the operands' dtype or float32. `out` is written in place; it needs the result's exact shape and
dtype, may have any strides, and must not overlap the operands.

Gradients run through the same kernels: dX = dY W^T and dW = X^T dY are products under the contract. dW sums over
the rows of the batch, so it depends on the batch by nature; it has the same bits in every schedule, in both frameworks
and in every run, and rows of zeros at the end of the batch leave it alone.

Errors, for every function: TypeError for an argument that is no tensor; RuntimeError for shapes that do not match, for
dtypes that are mixed or not supported, for tensors on different devices or on a GPU without kernels, for an `out`
that cannot be written, and for a gradient through `out`.
"""

import torch

from bi_torch.direct import repeat
from bi_torch.gemm.library import DTYPE_NAMES, Key, call_key, gemm, gemm_out, kept_call, output_shape

_DEVICES = ("cuda", "cpu", "meta")


def mm(
    a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """a [M, K] @ b [K, N] -> [M, N]."""
    key = call_key("mm", a, b, None, 1.0, 1.0, out_dtype) if out is None else None
    if (call := kept_call(key)) is not None:
        return repeat(call, (a, b, None, 1.0, 1.0))
    _check_dims("mm", a, b, 2)
    return _run("mm", a, b, None, 1.0, 1.0, out, out_dtype, key)


def addmm(
    bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """beta * bias + alpha * (a [M, K] @ b [K, N]) -> [M, N].

    alpha and beta are rounded to float32 once; both products and their sum are rounded one by one. The bias is
    broadcastable to [M, N]; with beta = 0 it is not read.
    """
    key = call_key("addmm", a, b, bias, alpha, beta, out_dtype) if out is None else None
    if (call := kept_call(key)) is not None:
        return repeat(call, (a, b, bias, alpha, beta))
    _check_dims("addmm", a, b, 2)
    return _run("addmm", a, b, bias, alpha, beta, out, out_dtype, key)


def bmm(
    a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """a [B, M, K] @ b [B, K, N] -> [B, M, N]; the batch sizes are equal."""
    key = call_key("bmm", a, b, None, 1.0, 1.0, out_dtype) if out is None else None
    if (call := kept_call(key)) is not None:
        return repeat(call, (a, b, None, 1.0, 1.0))
    _check_batches("bmm", a, b)
    return _run("bmm", a, b, None, 1.0, 1.0, out, out_dtype, key)


def baddbmm(
    bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """beta * bias + alpha * (a [B, M, K] @ b [B, K, N]) -> [B, M, N]; roundings as in `addmm`."""
    key = call_key("baddbmm", a, b, bias, alpha, beta, out_dtype) if out is None else None
    if (call := kept_call(key)) is not None:
        return repeat(call, (a, b, bias, alpha, beta))
    _check_batches("baddbmm", a, b)
    return _run("baddbmm", a, b, bias, alpha, beta, out, out_dtype, key)


def matmul(
    a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """torch.matmul: 1-D operands are a row or a column that the result drops, batch dimensions broadcast."""
    key = call_key("matmul", a, b, None, 1.0, 1.0, out_dtype) if out is None else None
    if (call := kept_call(key)) is not None:
        return repeat(call, (a, b, None, 1.0, 1.0))
    _check_tensor("matmul", a, "a")
    _check_tensor("matmul", b, "b")
    if a.dim() == 0 or b.dim() == 0:
        raise RuntimeError(f"bi_torch.matmul: both arguments need at least one dimension, got {_shapes(a, b)}")
    if a.dim() > 2 and b.dim() > 2 and a.shape[:-2] != b.shape[:-2]:
        _check_broadcast(a, b)
    row, column = a.dim() == 1, b.dim() == 1
    a = a.unsqueeze(0) if row else a
    b = b.unsqueeze(1) if column else b
    target = out
    if target is not None:
        _check_tensor("matmul", target, "out")
        target = target.unsqueeze(-1) if column else target
        target = target.unsqueeze(-2) if row else target
    result = _run("matmul", a, b, None, 1.0, 1.0, target, out_dtype, None if row or column else key)
    if out is not None:
        return out
    result = result.squeeze(-1) if column else result
    return result.squeeze(-1 if column else -2) if row else result


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """input [*, K] @ weight [N, K]^T + bias [N] -> [*, N], rounded once to the output dtype."""
    key = call_key("linear", input, weight, bias, 1.0, 1.0, out_dtype)
    if (call := kept_call(key)) is not None:
        return repeat(call, (input, weight, bias, 1.0, 1.0))
    _check_tensor("linear", input, "input")
    _check_tensor("linear", weight, "weight")
    if input.dim() == 0 or weight.dim() != 2:
        raise RuntimeError(f"bi_torch.linear: input must be [*, K] and weight [N, K], got {_shapes(input, weight)}")
    if bias is not None:
        _check_tensor("linear", bias, "bias")
        if bias.shape != weight.shape[:1]:
            raise RuntimeError(f"bi_torch.linear: bias must be [N] = {list(weight.shape[:1])}, got {list(bias.shape)}")
    if input.dim() == 1:
        return _run("linear", input.unsqueeze(0), weight.t(), bias, 1.0, 1.0, None, out_dtype).squeeze(0)
    return _run("linear", input, weight.t(), bias, 1.0, 1.0, None, out_dtype, key)


def _run(
    op: str,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: float,
    beta: float,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    key: Key | None = None,
) -> torch.Tensor:
    """Check what every op has in common and call the registered op; the call is kept by `key`, and is not checked again."""
    if a.dtype not in DTYPE_NAMES or b.dtype != a.dtype:
        raise RuntimeError(
            f"bi_torch.{op}: operands must share one dtype of {', '.join(DTYPE_NAMES.values())}, got {a.dtype} and {b.dtype}"
        )
    if a.device != b.device or a.device.type not in _DEVICES:
        raise RuntimeError(f"bi_torch.{op}: operands must be on one CPU or CUDA device, got {a.device} and {b.device}")
    if a.shape[-1] != b.shape[-2]:
        raise RuntimeError(f"bi_torch.{op}: the reduced extents differ: {_shapes(a, b)}")
    if out_dtype is None:
        out_dtype = a.dtype if out is None else out.dtype
    if out_dtype not in (a.dtype, torch.float32):
        raise RuntimeError(f"bi_torch.{op}: out_dtype must be {a.dtype} or torch.float32, got {out_dtype}")
    if bias is not None:
        _check_bias(op, bias, a, b)
    if out is None:
        return gemm(a, b, bias, alpha, beta, out_dtype, key)
    _check_out(op, out, out_dtype, a, b, bias)
    gemm_out(a, b, bias, alpha, beta, out_dtype, out=out)
    return out


def _check_bias(op: str, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    _check_tensor(op, bias, "bias")
    if bias.dtype not in (a.dtype, torch.float32) or bias.device != a.device:
        raise RuntimeError(
            f"bi_torch.{op}: bias must be {a.dtype} or torch.float32 on {a.device}, got {bias.dtype} on {bias.device}"
        )
    shape = output_shape(a, b)
    padded = (1,) * (len(shape) - bias.dim()) + tuple(bias.shape)
    if len(padded) != len(shape) or any(x not in (1, n) for x, n in zip(padded, shape, strict=True)):
        raise RuntimeError(f"bi_torch.{op}: bias {list(bias.shape)} does not broadcast to {list(shape)}")


def _check_out(
    op: str, out: torch.Tensor, dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None
) -> None:
    _check_tensor(op, out, "out")
    shape = output_shape(a, b)
    if out.shape != shape or out.dtype != dtype or out.device != a.device:
        raise RuntimeError(
            f"bi_torch.{op}: out must be {list(shape)} {dtype} on {a.device}, got {list(out.shape)} {out.dtype} on {out.device}"
        )
    if torch._debug_has_internal_overlap(out) == 1:
        raise RuntimeError(f"bi_torch.{op}: several elements of out share one memory location; clone it first")
    in_place = (
        bias is not None and bias.data_ptr() == out.data_ptr() and bias.shape == out.shape and bias.stride() == out.stride()
    )
    for name, x in (("a", a), ("b", b), ("bias", None if in_place else bias)):
        if x is not None and _overlap(out, x):
            raise RuntimeError(f"bi_torch.{op}: out overlaps {name} in memory; clone one of them first")


def _overlap(x: torch.Tensor, y: torch.Tensor) -> bool:
    """True if the address ranges of two tensors meet; interleaved views count, since telling them apart is hard."""
    if x.numel() == 0 or y.numel() == 0 or x.is_meta:
        return False
    (x_first, x_last), (y_first, y_last) = _address_range(x), _address_range(y)
    return x_first <= y_last and y_first <= x_last


def _address_range(x: torch.Tensor) -> tuple[int, int]:
    span = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (span + 1) * x.element_size() - 1


def _check_dims(op: str, a: torch.Tensor, b: torch.Tensor, dims: int) -> None:
    _check_tensor(op, a, "a")
    _check_tensor(op, b, "b")
    if a.dim() != dims or b.dim() != dims:
        raise RuntimeError(f"bi_torch.{op}: a and b must have {dims} dimensions, got {_shapes(a, b)}")


def _check_batches(op: str, a: torch.Tensor, b: torch.Tensor) -> None:
    _check_dims(op, a, b, 3)
    if a.shape[0] != b.shape[0]:
        raise RuntimeError(f"bi_torch.{op}: the batch sizes differ: {_shapes(a, b)}")


def _check_broadcast(a: torch.Tensor, b: torch.Tensor) -> None:
    try:
        torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        raise RuntimeError(f"bi_torch.matmul: batch dimensions do not broadcast: {_shapes(a, b)}") from None


def _check_tensor(op: str, x: torch.Tensor, name: str) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"bi_torch.{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_quantized:
        raise RuntimeError(f"bi_torch.{op}: {name} must be a dense tensor, got layout {x.layout}")


def _shapes(a: torch.Tensor, b: torch.Tensor) -> str:
    return f"{list(a.shape)} and {list(b.shape)}"
