"""The gradient of an embedding on a GPU: for every row of the weight, the cotangents of its tokens in the tokens' order.

Tokens are sorted by id, stably, so those of one id stand together in their order. A program adds up those of one id, in one
block of columns, one after the other in float32, from +0: no atomics, and no order but this one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bi_torch.rows.triton_arithmetic import canonical

BLOCK = 512


@triton.jit
def embedding_backward(ids, ends, tokens, g, dweight, D, rows, padding_idx, BLOCK: tl.constexpr):
    """`ids` are sorted, `ends` where the run of each one's id ends, `tokens` where they stood; g is [T, D]."""
    first = tl.program_id(0)
    row = tl.load(ids + first).to(tl.int64)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1).to(tl.int64)
    # One program a run works; an id that is no row of the weight has none.
    if (row != before) & (row >= 0) & (row < rows) & (row != padding_idx):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < D
        sums = tl.full([BLOCK], 0.0, tl.float32)
        for position in range(first, tl.load(ends + first)):
            cotangent = tl.load(g + tl.load(tokens + position) * D + column, mask=inside, other=0.0)
            sums += cotangent.to(tl.float32)
        tl.store(dweight + row * D + column, canonical(sums).to(dweight.dtype.element_ty), mask=inside)


def backward(g: Tensor, ids: Tensor, rows: int, padding_idx: int, dtype: torch.dtype) -> Tensor:
    """The gradient [rows, D] of the weight from the cotangents g [T, D] of the tokens' rows; ids [T]."""
    count, d = g.shape
    dweight = torch.zeros((rows, d), dtype=dtype, device=g.device)
    if count and d:
        ordered, tokens = torch.sort(ids, stable=True)
        ends = torch.searchsorted(ordered, ordered, right=True)
        g = g.contiguous()
        with torch.cuda.device_of(g):
            embedding_backward[(count, triton.cdiv(d, BLOCK))](
                ordered, ends, tokens, g, dweight, d, rows, padding_idx, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
            )
    return dweight
