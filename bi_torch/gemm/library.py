"""The op `bi_torch::gemm`, registered with PyTorch's dispatcher for CPU, CUDA, fake tensors and autograd.

Every public function of `bi_torch.gemm.api` is this one op on views of its arguments. It is opaque to the compiler:
Inductor calls it and cannot replace it by a matmul of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from bi_torch.device import new_tensor
from bi_torch.direct import keep, kernel_device, signature
from bi_torch.gemm import cpu, cuda
from bi_torch.stock import runs_stock
from bi_torch.transforms import Function, record, to_front
from bi_torch.uncompiled import uncompiled
from shared_specs import GemmContract, gemm_contract

_SCHEMA = "(Tensor a, Tensor b, Tensor? bias, float alpha, float beta, ScalarType out_dtype)"

_LIBRARY = torch.library.Library("bi_torch", "DEF")
_LIBRARY.define(f"gemm{_SCHEMA} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(f"gemm.out{_SCHEMA[:-1]}, *, Tensor(a!) out) -> ()", tags=(torch.Tag.pt2_compliant_tag,))

_op = torch.ops.bi_torch.gemm.default
gemm_out = torch.ops.bi_torch.gemm.out

Key = tuple[Any, ...]

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
"""Operand dtypes, by the names that contracts use."""


def output_shape(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    """[*, M, N] of a [*, M, K] @ b [*, K, N] with broadcast batch dimensions."""
    if a.dim() == b.dim() == 2:
        return a.shape[0], b.shape[1]
    return (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])


def _new_output(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    shape = output_shape(a, b)
    return a.new_empty(shape) if dtype is a.dtype else a.new_empty(shape, dtype=dtype)


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: float,
    beta: float,
    out_dtype: torch.dtype,
    key: Key | None = None,
) -> torch.Tensor:
    """alpha * (a @ b) + beta * bias, through the dispatcher where that matters; arguments are checked by the caller.

    Args:
        key: from `call_key`, if the caller has one for its own arguments, of which a and b are views; the call is kept by it.
    """
    key = key or call_key("gemm", a, b, bias, alpha, beta, out_dtype)
    if key is not None:
        call = CALLS.get(key)
        if call is None:
            return _first_call(key, a, b, bias, alpha, beta, out_dtype)
        return call((a, b, bias, alpha, beta))
    if _device((a, b, bias), alpha, beta) == "cpu":
        return _cpu(a, b, bias, float(alpha), float(beta), out_dtype)
    return _op(a, b, bias, alpha, beta, out_dtype)


def _below_autograd(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype
) -> torch.Tensor:
    """The op without its gradient."""
    if _device((a, b, bias), alpha, beta) is not None:
        return gemm(a, b, bias, alpha, beta, out_dtype)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(a, b, bias, alpha, beta, out_dtype)


def _differentiated(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """True if a gradient is to be recorded or, in forward mode, may have to be refused."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)):
        return True
    return forward_ad._current_level >= 0


def _kernels(run: Callable[..., None]) -> tuple[Callable[..., torch.Tensor], Callable[..., None]]:
    """The op and its `out` overload on an engine: run(a, b, bias, out, alpha=, beta=, contract=) takes 2-D and 3-D operands."""

    def into(
        a: torch.Tensor,
        b: torch.Tensor,
        bias: torch.Tensor | None,
        alpha: float,
        beta: float,
        out_dtype: torch.dtype,
        *,
        out: torch.Tensor,
    ) -> None:
        contract = gemm_contract(DTYPE_NAMES[a.dtype])
        for x, y, z, target in _matrices(a, b, bias if _reads_bias(beta) else None, out):
            run(x, y, z, target, alpha=alpha, beta=beta, contract=contract)

    def new(
        a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype
    ) -> torch.Tensor:
        out = _new_output(a, b, out_dtype)
        into(a, b, bias, alpha, beta, out_dtype, out=out)
        return out

    return runs_stock(new), runs_stock(into)


def _reads_bias(beta: float) -> bool:
    return bool(np.float32(beta) != 0)


def _run_on_cpu(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    contract: GemmContract,
) -> None:
    a, b, batched = (x if x.dim() == 3 else x.unsqueeze(0) for x in (a, b, out))
    batched.copy_(cpu.gemm(a, b, bias, alpha=alpha, beta=beta, contract=contract, out_dtype=out.dtype))


_cuda, _cuda_out = _kernels(cuda.gemm)
_cpu, _cpu_out = _kernels(_run_on_cpu)


@dataclass(frozen=True, slots=True)
class Call:
    """A product on a GPU that is one launch, for all arguments of one key.

    The kernel sees of a tensor where its elements begin, so an operand and a view of all of it serve alike.
    """

    plan: cuda.Plan
    shape: tuple[int, ...]
    dtype: torch.dtype
    reads_bias: bool

    def __call__(self, given: Sequence[Any]) -> torch.Tensor:
        a, b, bias, alpha, beta = given
        out = new_tensor(self.shape, self.dtype, a.device)
        self.plan.launch(a, b, bias if self.reads_bias else None, out, float(alpha), float(beta))
        return out


CALLS: dict[Key, Call] = {}
_MOST_CALLS = 1 << 14


def kept_call(key: Key | None) -> Call | None:
    """The call of a key, if it was made before; its arguments were checked then."""
    return None if key is None else CALLS.get(key)


def _device(tensors: tuple[torch.Tensor | None, ...], alpha: float, beta: float) -> str | None:
    """As `kernel_device`; None for scalars that the dispatcher would have to look at."""
    return kernel_device(tensors) if type(alpha) in (float, int) and type(beta) in (float, int) else None


def call_key(
    op: str,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: float,
    beta: float,
    out_dtype: torch.dtype | None,
) -> Key | None:
    """What decides how `op` computes a product of these, and whether it may; None where it cannot be a mere launch."""
    if _device((a, b, bias), alpha, beta) != "cuda":
        return None
    return op, signature(a), signature(b), signature(bias), out_dtype, alpha == 1.0, bias is None or _reads_bias(beta)


def _first_call(
    key: Key, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype
) -> torch.Tensor:
    out, reads_bias = _new_output(a, b, out_dtype), bias is not None and _reads_bias(beta)
    contract = gemm_contract(DTYPE_NAMES[a.dtype])
    products = list(_matrices(a, b, bias if reads_bias else None, out))
    plans = [cuda.plan_of(*product, alpha, contract) for product in products]
    for plan, product in zip(plans, products, strict=True):
        plan.launch(*product, float(alpha), float(beta))
    if len(plans) == 1:
        keep(CALLS, key, Call(plans[0], tuple(out.shape), out.dtype, reads_bias), _MOST_CALLS)
    return out


_Product = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]


def _matrices(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> Iterator[_Product]:
    """The product as products of at most three dimensions, on views: the batch is folded into M or into one, or walked over."""
    if out.numel() == 0:
        return
    if out.dim() == 2:
        yield a, b, bias, out
        return
    bias = None if bias is None else bias.expand(out.shape)
    if b.dim() == 2 and _foldable(a) and _foldable(out) and (bias is None or _foldable(bias)):
        rows = out.shape[:-1].numel()
        yield (
            a.view(rows, a.shape[-1]),
            b,
            None if bias is None else bias.view(rows, bias.shape[-1]),
            out.view(rows, out.shape[-1]),
        )
        return
    a = a.expand(*out.shape[:-2], *a.shape[-2:])
    b = b.expand(*out.shape[:-2], *b.shape[-2:])
    if out.dim() > 3 and all(_foldable(x, 2) for x in (a, b, bias, out) if x is not None):
        batch = out.shape[:-2].numel()
        a, b, out = (x.view(batch, *x.shape[-2:]) for x in (a, b, out))
        bias = None if bias is None else bias.view(batch, *bias.shape[-2:])
    if out.dim() == 3:
        yield a, b, bias, out
        return
    for i in range(out.shape[0]):
        yield from _matrices(a[i], b[i], None if bias is None else bias[i], out[i])


def _foldable(x: torch.Tensor, last: int = 1) -> bool:
    """True if all dimensions but the `last` ones are one dimension with one stride."""
    rows = [(n, s) for n, s in zip(x.shape[:-last], x.stride()[:-last], strict=True) if n != 1]
    return all(outer == inner * n for (_, outer), (n, inner) in pairwise(rows))


def _fake(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype
) -> torch.Tensor:
    return _new_output(a, b, out_dtype)


def _fake_out(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: float,
    beta: float,
    out_dtype: torch.dtype,
    *,
    out: torch.Tensor,
) -> None:
    pass


class _Gemm(Function):
    """Gradients are products under the same contract, so they too are the same bits in every schedule and framework."""

    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype
    ) -> torch.Tensor:
        # An operand is kept for the other one's gradient alone: else it may be written to, and need not be remembered.
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
        ctx.a_shape, ctx.b_shape, ctx.dtype = a.shape, b.shape, a.dtype
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.alpha, ctx.beta = alpha, beta
        return _below_autograd(a, b, bias, alpha, beta, out_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        a, b = ctx.saved_tensors
        g = grads[0].to(ctx.dtype)
        grad_a = grad_b = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_a = _reduced_gemm(g, b.mT, ctx.a_shape, ctx.alpha)
        if ctx.needs_input_grad[1]:
            grad_b = _reduced_gemm(a.mT, g, ctx.b_shape, ctx.alpha)
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
    return gemm(x, y, None, alpha, 1.0, x.dtype).reshape(shape)


def _reduced_sum(g: torch.Tensor, shape: torch.Size, beta: float, dtype: torch.dtype) -> torch.Tensor:
    """beta * g, summed over the dimensions that a bias of `shape` was broadcast along, as a product with ones."""
    own = (1,) * (g.dim() - len(shape)) + tuple(shape)
    summed = [i for i, n in enumerate(g.shape) if own[i] == 1 and n != 1]
    kept = [i for i in range(g.dim()) if i not in summed]
    columns = torch.Size([g.shape[i] for i in kept]).numel()
    g = g.permute(*summed, *kept).reshape(-1, columns)
    ones = torch.ones((1, g.shape[0]), dtype=g.dtype, device=g.device)
    return gemm(ones, g, None, beta, 1.0, dtype).reshape(shape)


def _autograd(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype
) -> torch.Tensor:
    if _differentiated(a, b, bias):
        return record(_Gemm, a, b, bias, alpha, beta, out_dtype)
    return _below_autograd(a, b, bias, alpha, beta, out_dtype)


def _autograd_out(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: float,
    beta: float,
    out_dtype: torch.dtype,
    *,
    out: torch.Tensor,
) -> None:
    if _differentiated(a, b, bias) or (torch.is_grad_enabled() and out.requires_grad):
        raise RuntimeError("bi_torch.gemm: functions with out=... arguments don't support automatic differentiation")
    with torch._C._AutoDispatchBelowAutograd():
        gemm_out(a, b, bias, alpha, beta, out_dtype, out=out)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[torch.Tensor, int]:
    """The batch as the outermost of the dimensions that a product walks over anyway."""
    a, b, bias, *rest = args
    rank = max(x.dim() - (dim is not None) for x, dim in zip((a, b), in_dims, strict=False))

    def aligned(x: Any, dim: int | None) -> Any:
        if dim is None:
            return x
        x = x.movedim(dim, 0)
        return x.reshape(x.shape[0], *(1,) * (rank - x.dim() + 1), *x.shape[1:])

    if in_dims[0] is None and in_dims[1] is None:  # only the bias has the batch
        a, in_dims = to_front(a, None, info.batch_size), (0, *in_dims[1:])
    return gemm(*(aligned(x, dim) for x, dim in zip((a, b, bias), in_dims, strict=False)), *rest), 0


_KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "gemm": {"CPU": _cpu, "CUDA": _cuda, "Meta": _fake, "Autograd": _autograd},
    "gemm.out": {"CPU": _cpu_out, "CUDA": _cuda_out, "Meta": _fake_out, "Autograd": _autograd_out},
}
for name, kernels in _KERNELS.items():
    for key, kernel in kernels.items():
        _LIBRARY.impl(name, uncompiled(kernel), key)
torch.library.register_vmap("bi_torch::gemm", _vmap, lib=_LIBRARY)
