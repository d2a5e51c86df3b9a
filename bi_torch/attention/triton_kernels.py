"""Triton kernels of attention beside its products and softmax: what surrounds numbers that are not finite.

A key that a row does not admit has the weight 0, and 0 times a value that is not finite is NaN. So the product reads 0 in the
place of such a value, and every column is told its first one: `take`. Rows that admit it get NaN afterwards: `settle`.
"""

import triton
import triton.language as tl

from bi_torch.gemm.triton_kernels import _finite_or_nan, _is_finite
from bi_torch.rows.triton_kernels import _cdiv


@triton.jit
def _smaller(x, y):
    return tl.minimum(x, y)


@triton.jit(do_not_specialize=["K", "parts", "span", "rows", "queries"])
def take(
    x, order, y, first, lengths, stride_n, stride_k, stride_d, D, K, parts, span, rows, queries,
    ORDER: tl.constexpr, FINITE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y [N, K, D] is x, with ORDER its keys in the `order` [N, K] of each entry.

    With FINITE y is 0 where x is not finite, and `first` [N, parts, D] says where each column of y first is not, K if nowhere;
    every part of `span` keys for itself. With CAUSAL `lengths` [rows] says how many keys a row admits, query after query.
    """
    index = tl.program_id(0)
    blocks = _cdiv(D, BLOCK_D)
    column = index % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    part = index // blocks % parts
    n = (index // (blocks * parts)).to(tl.int64)
    found = tl.full([BLOCK_D], 0, tl.int32) + K
    for k0 in range(part * span, tl.minimum(part * span + span, K), BLOCK_K):
        place = k0 + tl.arange(0, BLOCK_K)
        source = place
        if ORDER:
            source = tl.load(order + n * K + place, mask=place < K, other=0)
        inside = (place < K)[:, None] & (column < D)[None, :]
        offsets = source.to(tl.int64)[:, None] * stride_k + column.to(tl.int64)[None, :] * stride_d
        value = tl.load(x + n * stride_n + offsets, mask=inside, other=0.0)
        if FINITE:
            finite = _is_finite(value.to(tl.float32))
            found = tl.minimum(found, tl.reduce(tl.where(finite, K, place[:, None]), 0, _smaller))
            value = tl.where(finite, value, tl.full(value.shape, 0.0, value.dtype))
        tl.store(y + (n * K + place.to(tl.int64)[:, None]) * D + column[None, :], value, mask=inside)
    if FINITE:
        tl.store(first + (n * parts + part) * D + column, found, mask=column < D)
    if CAUSAL:
        for r0 in range(index * BLOCK_K, rows, tl.num_programs(0) * BLOCK_K):
            row = r0 + tl.arange(0, BLOCK_K)
            tl.store(lengths + row, tl.minimum(row % queries + 1, K), mask=row < rows)


@triton.jit(do_not_specialize=["R", "parts"])
def settle(
    y, first, lengths, D, R, parts, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """y [N, R, D] becomes NaN where it is not finite, and where a row admits a key that `first` names; `lengths` is [N, R]."""
    index = tl.program_id(0)
    blocks, blocks_r = _cdiv(D, BLOCK_D), _cdiv(R, BLOCK_R)
    column = index % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    row = index // blocks % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    n = (index // (blocks * blocks_r)).to(tl.int64)
    part = tl.arange(0, PARTS)
    named = tl.load(
        first + (n * parts + part[:, None]) * D + column[None, :],
        mask=(part < parts)[:, None] & (column < D)[None, :],
        other=0x7FFFFFFF,
    )
    length = tl.load(lengths + n * R + row, mask=row < R, other=0)
    inside = (row < R)[:, None] & (column < D)[None, :]
    places = y + (n * R + row.to(tl.int64)[:, None]) * D + column[None, :]
    value = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    admitted = tl.reduce(named, 0, _smaller)[None, :] < length[:, None]
    value = _finite_or_nan(tl.where(admitted, float("inf"), value))
    tl.store(places, value.to(y.dtype.element_ty), mask=inside)
