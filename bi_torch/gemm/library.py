"""The op `bi_torch::gemm`, registered with PyTorch's dispatcher for CPU, CUDA, fake tensors and autograd.

Every public function of `bi_torch.gemm.api` is this one op on views of its arguments. It is opaque to the compiler:
Inductor calls it and cannot replace it by a matmul of its own.
"""

from typing import Any

import torch

from bi_torch.gemm import cpu, cuda
from shared_specs import gemm_contract

_SCHEMA = "(Tensor a, Tensor b, Tensor? bias, float alpha, float beta, ScalarType out_dtype)"

_LIBRARY = torch.library.Library("bi_torch", "DEF")
_LIBRARY.define(f"gemm{_SCHEMA} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(f"gemm.out{_SCHEMA[:-1]}, *, Tensor(a!) out) -> Tensor(a!)", tags=(torch.Tag.pt2_compliant_tag,))

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
"""Operand dtypes, by the names that contracts use."""


def output_shape(a: torch.Tensor, b: torch.Tensor) -> torch.Size:
    """[*, M, N] of a [*, M, K] @ b [*, K, N] with broadcast batch dimensions."""
    return torch.Size((*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]))


def _forward(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(output_shape(a, b), dtype=out_dtype, device=a.device)
    return _forward_out(a, b, bias, alpha, beta, out_dtype, out=out)


def _forward_out(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype, *, out: torch.Tensor
) -> torch.Tensor:
    if out.numel():
        if bias is not None and beta == 0:
            bias = None
        _collapse(a, b, bias, alpha, beta, out)
    return out


def _collapse(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, alpha: float, beta: float, out: torch.Tensor) -> None:
    """Run the product as one [B, M, K] @ [B, K, N], folding the batch into M or B where views can; else slice by slice."""
    if bias is not None:
        bias = bias.expand(out.shape)
    if out.dim() == 2:
        a, b, out = a.unsqueeze(0), b.unsqueeze(0), out.unsqueeze(0)
        bias = None if bias is None else bias.unsqueeze(0)
    elif b.dim() == 2 and all(x is None or _foldable(x) for x in (a, bias, out)):
        rows = out.shape[:-1].numel()
        a, b, out = a.view(1, rows, a.shape[-1]), b.unsqueeze(0), out.view(1, rows, out.shape[-1])
        bias = None if bias is None else bias.view(1, rows, bias.shape[-1])
    else:
        a = a.expand(*out.shape[:-2], *a.shape[-2:])
        b = b.expand(*out.shape[:-2], *b.shape[-2:])
        if out.dim() > 3:
            for i in range(out.shape[0]):
                _collapse(a[i], b[i], None if bias is None else bias[i], alpha, beta, out[i])
            return
    contract = gemm_contract(DTYPE_NAMES[a.dtype])
    if out.is_cuda:
        cuda.gemm(a, b, bias, out, alpha=alpha, beta=beta, contract=contract)
    else:
        out.copy_(cpu.gemm(a, b, bias, alpha=alpha, beta=beta, contract=contract, out_dtype=out.dtype))


def _foldable(x: torch.Tensor) -> bool:
    """True if all dimensions but the last are one dimension with one stride."""
    rows = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    return all(outer == inner * n for (_, outer), (n, inner) in zip(rows, rows[1:], strict=False))


def _fake(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype) -> torch.Tensor:
    return a.new_empty(output_shape(a, b), dtype=out_dtype)


def _fake_out(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype, *, out: torch.Tensor
) -> torch.Tensor:
    return out


class _Gemm(torch.autograd.Function):
    """Gradients are products under the same contract, so they too are the same bits in every schedule and framework."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.alpha, ctx.beta = alpha, beta
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.bi_torch.gemm.default(a, b, bias, alpha, beta, out_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        a, b = ctx.saved_tensors
        g = grads[0].to(a.dtype)
        grad_a = grad_b = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_a = _reduced_gemm(g, b.mT, a.shape, ctx.alpha)
        if ctx.needs_input_grad[1]:
            grad_b = _reduced_gemm(a.mT, g, b.shape, ctx.alpha)
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.bias
            grad_bias = _reduced_sum(g, shape, ctx.beta, dtype)
        return grad_a, grad_b, grad_bias, None, None, None


def _reduced_gemm(x: torch.Tensor, y: torch.Tensor, shape: torch.Size, alpha: float) -> torch.Tensor:
    """alpha * (x @ y), summed over the batch dimensions that the operand of `shape` was broadcast along.

    The sum is part of the product's K: outer batch dimensions first, then the product's own K. No second reduction.
    """
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])
    own = (1,) * (len(batch) + 2 - len(shape)) + tuple(shape[:-2])
    summed = [i for i, n in enumerate(batch) if own[i] == 1 and n != 1]
    kept = [i for i in range(len(batch)) if i not in summed]
    if summed:
        rows, cols = len(batch), len(batch) + 1
        kept_shape = [batch[i] for i in kept]
        x = x.permute(*kept, rows, *summed, cols).reshape(*kept_shape, x.shape[-2], -1)
        y = y.permute(*kept, *summed, rows, cols).reshape(*kept_shape, -1, y.shape[-1])
    return torch.ops.bi_torch.gemm(x, y, None, alpha, 1.0, x.dtype).reshape(shape)


def _reduced_sum(g: torch.Tensor, shape: torch.Size, beta: float, dtype: torch.dtype) -> torch.Tensor:
    """beta * g, summed over the dimensions that a bias of `shape` was broadcast along, as a product with ones."""
    own = (1,) * (g.dim() - len(shape)) + tuple(shape)
    summed = [i for i, n in enumerate(g.shape) if own[i] == 1 and n != 1]
    kept = [i for i in range(g.dim()) if i not in summed]
    columns = torch.Size([g.shape[i] for i in kept]).numel()
    g = g.permute(*summed, *kept).reshape(-1, columns)
    ones = torch.ones((1, g.shape[0]), dtype=g.dtype, device=g.device)
    return torch.ops.bi_torch.gemm(ones, g, None, beta, 1.0, dtype).reshape(shape)


def _autograd(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype) -> torch.Tensor:
    tracked = a.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)
    if tracked and torch.is_grad_enabled():
        return _Gemm.apply(a, b, bias, alpha, beta, out_dtype)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.bi_torch.gemm.default(a, b, bias, alpha, beta, out_dtype)


def _autograd_out(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype, *, out: torch.Tensor
) -> torch.Tensor:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (a, b, bias, out)):
        raise RuntimeError("bi_torch.gemm: functions with out=... arguments don't support automatic differentiation")
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.bi_torch.gemm.out(a, b, bias, alpha, beta, out_dtype, out=out)


for key in ("CPU", "CUDA"):
    _LIBRARY.impl("gemm", _forward, key)
    _LIBRARY.impl("gemm.out", _forward_out, key)
_LIBRARY.impl("gemm", _fake, "Meta")
_LIBRARY.impl("gemm.out", _fake_out, "Meta")
_LIBRARY.impl("gemm", _autograd, "Autograd")
_LIBRARY.impl("gemm.out", _autograd_out, "Autograd")
