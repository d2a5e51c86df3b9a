"""Products: mm, addmm and their relatives, linear, matmul and attention, all on the one GEMM and its contract.

torch takes `linear` apart by its input's strides, into addmm or into bmm and an addition, which round differently; here it is
one product with one rounding.
"""

from typing import Any

import torch
from torch import Tensor

from bi_torch import attention
from bi_torch.gemm import api
from bi_torch.mode.override import Override
from bi_torch.rows.arguments import FLOATS


def mm(self: Tensor, mat2: Tensor) -> Any:
    """self @ mat2."""
    return api.mm(self, mat2) if self.dtype in FLOATS else NotImplemented


def mm_dtype(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Any:
    """self @ mat2 in a dtype."""
    return api.mm(self, mat2, out_dtype=out_dtype) if self.dtype in FLOATS else NotImplemented


def bmm(self: Tensor, mat2: Tensor) -> Any:
    """The products of two batches of matrices."""
    return api.bmm(self, mat2) if self.dtype in FLOATS else NotImplemented


def bmm_dtype(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Any:
    """The products of two batches of matrices in a dtype."""
    return api.bmm(self, mat2, out_dtype=out_dtype) if self.dtype in FLOATS else NotImplemented


def addmm(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """beta * self + alpha * (mat1 @ mat2)."""
    return api.addmm(self, mat1, mat2, beta=beta, alpha=alpha) if mat1.dtype in FLOATS else NotImplemented


def addmm_dtype(self: Tensor, mat1: Tensor, mat2: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1) -> Any:
    """addmm in a dtype."""
    if mat1.dtype not in FLOATS:
        return NotImplemented
    return api.addmm(self, mat1, mat2, beta=beta, alpha=alpha, out_dtype=out_dtype)


def baddbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """beta * self + alpha * (batch1 @ batch2)."""
    return api.baddbmm(self, batch1, batch2, beta=beta, alpha=alpha) if batch1.dtype in FLOATS else NotImplemented


def baddbmm_dtype(
    self: Tensor, batch1: Tensor, batch2: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1
) -> Any:
    """baddbmm in a dtype."""
    if batch1.dtype not in FLOATS:
        return NotImplemented
    return api.baddbmm(self, batch1, batch2, beta=beta, alpha=alpha, out_dtype=out_dtype)


def addbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """beta * self + alpha * the sum of batch1 @ batch2 over the batch: one product, whose K runs over the batch first."""
    if batch1.dtype not in FLOATS:
        return NotImplemented
    _check_dims("addbmm", batch1, 3, batch2, 3)
    if batch1.shape[::2] != batch2.shape[:2]:
        raise RuntimeError(f"addbmm: batch1 {list(batch1.shape)} and batch2 {list(batch2.shape)} do not match")
    b, m, k = batch1.shape
    rows, columns = batch1.transpose(0, 1).reshape(m, b * k), batch2.reshape(b * k, batch2.shape[2])
    return api.addmm(self, rows, columns, beta=beta, alpha=alpha)


def mv(self: Tensor, vec: Tensor) -> Any:
    """self [M, K] @ vec [K]."""
    if self.dtype not in FLOATS:
        return NotImplemented
    _check_dims("mv", self, 2, vec, 1)
    return api.matmul(self, vec)


def addmv(self: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """beta * self + alpha * (mat [M, K] @ vec [K])."""
    if mat.dtype not in FLOATS:
        return NotImplemented
    _check_dims("addmv", mat, 2, vec, 1)
    bias = self.unsqueeze(-1) if self.dim() else self
    return api.addmm(bias, mat, vec.unsqueeze(-1), beta=beta, alpha=alpha).squeeze(-1)


def dot(self: Tensor, tensor: Tensor) -> Any:
    """self [K] @ tensor [K]."""
    if self.dtype not in FLOATS:
        return NotImplemented
    _check_dims("dot", self, 1, tensor, 1)
    return api.matmul(self, tensor)


def addr(self: Tensor, vec1: Tensor, vec2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """beta * self + alpha * the outer product of vec1 [M] and vec2 [N]."""
    if vec1.dtype not in FLOATS:
        return NotImplemented
    _check_dims("addr", vec1, 1, vec2, 1)
    return api.addmm(self, vec1.unsqueeze(1), vec2.unsqueeze(0), beta=beta, alpha=alpha)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """input [*, K] @ weight [N, K]^T + bias [N]; a weight [K] drops the last dimension."""
    if input.dtype not in FLOATS:
        return NotImplemented
    if weight.dim() == 1:
        return api.linear(input, weight.unsqueeze(0), None if bias is None else bias.reshape(1)).squeeze(-1)
    return api.linear(input, weight, bias)


def matmul(self: Tensor, other: Tensor) -> Any:
    """torch.matmul, of any dimensions."""
    return api.matmul(self, other) if self.dtype in FLOATS else NotImplemented


def grouped_mm(
    self: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """A product for every group; `offs` holds where each group ends, along the dimension that is in groups.

    self [T, K] and mat2 [G, K, N]: groups of rows. self [G, M, K] and mat2 [K, T]: groups of columns. self [M, T] and
    mat2 [T, N]: groups of K, one output [M, N] each. Both with three dimensions: `bmm`. Rows and columns behind the last
    group are 0. The groups' ends are read on the host, which waits for the GPU.
    """
    if self.dtype not in FLOATS:
        return NotImplemented
    if bias is not None:
        raise RuntimeError("_grouped_mm: a bias is not supported")
    if self.dim() == 3 and mat2.dim() == 3:
        return api.bmm(self, mat2, out_dtype=out_dtype)
    if offs is None:
        raise RuntimeError("_grouped_mm: operands of two dimensions need offs")
    ends = offs.tolist()
    groups = [slice(lo, hi) for lo, hi in zip([0, *ends[:-1]], ends, strict=True)]
    if self.dim() == 2 and mat2.dim() == 2:
        return torch.stack([api.mm(self[:, group], mat2[group], out_dtype=out_dtype) for group in groups])
    if self.dim() == 2:
        parts = [api.mm(self[group], mat2[i], out_dtype=out_dtype) for i, group in enumerate(groups)]
        return torch.cat([*parts, parts[0].new_zeros(self.shape[0] - ends[-1], mat2.shape[2])])
    parts = [api.mm(self[i], mat2[:, group], out_dtype=out_dtype) for i, group in enumerate(groups)]
    return torch.cat([*parts, parts[0].new_zeros(self.shape[1], mat2.shape[1] - ends[-1])], 1)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(scale * query @ key^T + mask) @ value; with dropout, torch's composition of ops that are replaced."""
    if query.dtype not in FLOATS:
        return NotImplemented
    if dropout_p:
        composed = torch.ops.aten._scaled_dot_product_attention_math
        return composed(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
    return attention.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _check_dims(op: str, a: Tensor, a_dims: int, b: Tensor, b_dims: int) -> None:
    if a.dim() != a_dims or b.dim() != b_dims:
        raise RuntimeError(
            f"{op}: operands must have {a_dims} and {b_dims} dimensions, got {list(a.shape)} and {list(b.shape)}"
        )


OVERRIDES = (
    Override("mm", mm, out="mm.out"),
    Override("mm.dtype", mm_dtype, out="mm.dtype_out"),
    Override("bmm", bmm, out="bmm.out"),
    Override("bmm.dtype", bmm_dtype, out="bmm.dtype_out"),
    Override("addmm", addmm, in_place="addmm_", out="addmm.out"),
    Override("addmm.dtype", addmm_dtype, out="addmm.dtype_out"),
    Override("baddbmm", baddbmm, in_place="baddbmm_", out="baddbmm.out"),
    Override("baddbmm.dtype", baddbmm_dtype, out="baddbmm.dtype_out"),
    Override("addbmm", addbmm, in_place="addbmm_", out="addbmm.out"),
    Override("mv", mv, out="mv.out"),
    Override("addmv", addmv, in_place="addmv_", out="addmv.out"),
    Override("dot", dot, out="dot.out"),
    Override("vdot", dot, out="vdot.out"),
    Override("addr", addr, in_place="addr_", out="addr.out"),
    Override("linear", linear, out="linear.out"),
    Override("matmul", matmul, out="matmul.out"),
    Override("_grouped_mm", grouped_mm),
    Override("scaled_dot_product_attention", scaled_dot_product_attention),
)
