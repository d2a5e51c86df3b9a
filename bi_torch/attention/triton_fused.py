"""Triton kernels of attention in one launch: a program makes all of some rows of one entry.

Both evaluate the contract's own chains and trees, so that their bits are those of the composed path:

    scores     a chain of dot instructions over the head dimension, times `scale`
    sum_exp    of `shared_specs.programs.attention`, over rows of one segment: the maximum first, then the lanes
    output     a chain of dot instructions over the keys, in ascending order

    attend_stored      few rows: their scores are kept in memory, so that keys and values are read once
    attend_recomputed  many rows: scores are computed anew for the maximum, for the sum and for the product, and never stored

A weight of 0 leaves an accumulator as it is, so a program stops at the last key that one of its rows admits. Where an output
is not finite, the reason may be a value that its row does not admit: the product is then made once more, with 0 in the place
of such values (`_careful`). The kernels must be compiled with `enable_fp_fusion=False`.
"""

import triton
import triton.language as tl

from bi_torch.attention.triton_kernels import _smaller
from bi_torch.gemm.triton_kernels import _is_finite, _rounded
from bi_torch.rows.triton_arithmetic import evaluate, exp_term, larger
from bi_torch.rows.triton_kernels import _cdiv, _extreme, _larger, _tree


@triton.jit
def _place(index, strides, inner):
    """Where entry `index` begins, its number being that of two dimensions of which the last has the extent `inner`."""
    return (index // inner) * strides[0] + (index % inner) * strides[1]


@triton.jit
def _rows(first, R, BLOCK_R: tl.constexpr):
    """Rows of a block; those beyond the last one repeat it."""
    return tl.minimum(first + tl.arange(0, BLOCK_R), R - 1)


@triton.jit
def _lengths(lengths, n, row, R, K, queries, MASKED: tl.constexpr, CAUSAL: tl.constexpr):
    """How many keys each row admits."""
    if CAUSAL:
        return tl.minimum(row % queries + 1, K)
    elif MASKED:
        return tl.load(lengths + n * R + row)
    else:
        return tl.full(row.shape, 0, tl.int32) + K


@triton.jit
def _queries(query, strides, row, queries, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """[BLOCK_R, BLOCK_E], zeros beyond E; `strides` of groups, queries and E."""
    column = tl.arange(0, BLOCK_E)
    offsets = (row // queries * strides[0] + row % queries * strides[1])[:, None] + (column * strides[2])[None, :]
    if E == BLOCK_E:
        return tl.load(query + offsets)
    else:
        return tl.load(query + offsets, mask=(column < E)[None, :], other=0.0)


@triton.jit
def _keys(x, order, k0, K, strides, ORDER: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr):
    """[BLOCK_K, BLOCK_E] keys or values, zeros beyond K and E; with ORDER those that stand there in the order of keys."""
    place = k0 + tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_E)
    inside = (place < K)[:, None]
    if E != BLOCK_E:
        inside = inside & (column < E)[None, :]
    if ORDER:
        place = tl.load(order + place, mask=place < K, other=0)
    return tl.load(x + (place * strides[0])[:, None] + (column * strides[1])[None, :], mask=inside, other=0.0)


@triton.jit
def _careful(value, k0, first, K, BLOCK_K: tl.constexpr):
    """A tile of values with 0 for what is not finite, and the first key of each column where that was so far."""
    finite = _is_finite(value.to(tl.float32))
    place = k0 + tl.arange(0, BLOCK_K)
    first = tl.minimum(first, tl.reduce(tl.where(finite, K, place[:, None]), 0, _smaller))
    return tl.where(finite, value, tl.full(value.shape, 0.0, value.dtype)), first


@triton.jit
def _is_lost(x):
    """Whether anything is not finite."""
    finite = tl.where(_is_finite(x), 1, 0)
    return tl.reduce(tl.reduce(finite, 1, _smaller), 0, _smaller) == 0


@triton.jit
def _settled(acc, first, length):
    """Not finite where a row admits a value that is not."""
    return tl.where(first[None, :] < length[:, None], float("inf"), acc)


@triton.jit
def _store(out, acc, row, first, R, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Outputs rounded once, NaN where they are not finite then; `row` counts all rows of all entries."""
    column = tl.arange(0, BLOCK_D)
    inside = (first + tl.arange(0, BLOCK_R) < R)[:, None] & (column < D)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * D + column[None, :], _rounded(acc, out.dtype.element_ty, True), mask=inside)


@triton.jit
def _tree_2d(x):
    """[R, L] to [R, 1]."""
    return tl.reshape(_tree(tl.reshape(x, [x.shape[0], 1, x.shape[1]])), [x.shape[0], 1])


@triton.jit
def _scores(
    query, key, order, k0, K, strides, length, shortest, scale, PREFIX: tl.constexpr, ORDER: tl.constexpr, E: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_K] scores as the softmax reads them."""
    scores = tl.dot(query, _keys(key, order, k0, K, strides, ORDER, E, BLOCK_K, BLOCK_E).T) * scale
    if k0 + BLOCK_K > shortest:
        column = (k0 + tl.arange(0, BLOCK_K))[None, :]
        scores = evaluate(PREFIX, "reductions", 0, (scores,), (length[:, None],), (), column, scores.shape)
    return scores


@triton.jit
def _weights(scores, maximum, total, k0, length, shortest, PLAIN: tl.constexpr, PREFIX: tl.constexpr, BLOCK_K: tl.constexpr):
    """The softmax of a tile of scores."""
    state = (maximum, total, exp_term(scores, maximum), 1.0)
    weights = evaluate(PLAIN, "factors", 0, (scores,), (), (state,), None, scores.shape)
    if k0 + BLOCK_K > shortest:
        column = (k0 + tl.arange(0, BLOCK_K))[None, :]
        weights = evaluate(PREFIX, "factors", 0, (scores,), (length[:, None],), (state,), column, scores.shape)
    return weights


@triton.jit
def _in_lanes(index, blocks, CHUNK: tl.constexpr):
    """The index-th of `blocks` blocks of keys, in the order of lanes: (its lanes' number, itself, is it the last in them).

    CHUNK blocks are a chunk of lanes. The first blocks of a chunk are in one chunk more than those that follow.
    """
    chunks, more = blocks // CHUNK, blocks % CHUNK
    behind = index - more * (chunks + 1)
    fewer = tl.maximum(chunks, 1)
    group = tl.where(behind < 0, index // (chunks + 1), more + behind // fewer)
    chunk = tl.where(behind < 0, index % (chunks + 1), behind % fewer)
    return group, chunk * CHUNK + group, (chunk + 1) * CHUNK + group >= blocks


@triton.jit
def _product(
    query, key, value, order, key_strides, value_strides, maximum, total, length, shortest, scale, K, blocks,
    PLAIN: tl.constexpr, PREFIX: tl.constexpr, ORDER: tl.constexpr, CAREFUL: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_D] outputs before they are rounded."""
    acc = tl.full([query.shape[0], BLOCK_D], 0.0, tl.float32)
    lost = tl.full([BLOCK_D], 0, tl.int32) + K
    for i in range(blocks):
        k0 = i * BLOCK_K
        scores = _scores(
            query, key, order, k0, K, key_strides, length, shortest, scale, PREFIX, ORDER, E, BLOCK_K, BLOCK_E
        )  # fmt: skip
        weights = _weights(scores, maximum, total, k0, length, shortest, PLAIN, PREFIX, BLOCK_K)
        values = _keys(value, order, k0, K, value_strides, ORDER, D, BLOCK_K, BLOCK_D)
        if CAREFUL:
            values, lost = _careful(values, k0, lost, K, BLOCK_K)
        acc = tl.dot(weights.to(query.dtype), values, acc)
    if CAREFUL:
        acc = _settled(acc, lost, length)
    return acc


@triton.jit(do_not_specialize=["inner", "R", "K", "queries"])
def attend_recomputed(
    query, key, value, lengths, order, out, query_strides, key_strides, value_strides, scale, inner, R, K, queries,
    PLAIN: tl.constexpr, PREFIX: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, ORDER: tl.constexpr,
    E: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [N, R, D], contiguous, of query [N, R, E], key [N, K, E] and value [N, K, D].

    Strides are those of the two dimensions that N stands for, of which the last has the extent `inner`; then those of groups,
    queries and E, or of keys and E. `lengths` is int32 [N, R], `order` int32 [N, K]. The rows with most keys come first.
    """
    blocks_r = _cdiv(R, BLOCK_R)
    n = (tl.program_id(0) // blocks_r).to(tl.int64)
    first = (blocks_r - 1 - tl.program_id(0) % blocks_r) * BLOCK_R
    query += _place(n, query_strides[0:2], inner)
    key += _place(n, key_strides[0:2], inner)
    value += _place(n, value_strides[0:2], inner)
    if ORDER:
        order += n * K
    row = _rows(first, R, BLOCK_R)
    length = _lengths(lengths, n, row, R, K, queries, MASKED, CAUSAL)
    shortest = tl.reduce(length, 0, _smaller)
    blocks = _cdiv(-tl.reduce(-length, 0, _smaller), BLOCK_K)
    q = _queries(query, query_strides[2:5], row, queries, E, BLOCK_E)
    maximum = tl.full([BLOCK_R], -float("inf"), tl.float32)
    for i in range(blocks):
        scores = _scores(
            q, key, order, i * BLOCK_K, K, key_strides[2:4], length, shortest, scale, PREFIX, ORDER, E, BLOCK_K, BLOCK_E
        )  # fmt: skip
        maximum = larger(maximum, tl.reduce(scores, 1, _larger))
    maximum = maximum[:, None]

    CHUNK: tl.constexpr = LANES // BLOCK_K
    lanes = tl.full([BLOCK_R, BLOCK_K], 0.0, tl.float32)
    groups = tl.full([BLOCK_R, CHUNK], 0.0, tl.float32)
    for i in range(blocks):
        group, block, last = _in_lanes(i, blocks, CHUNK)
        scores = _scores(
            q, key, order, block * BLOCK_K, K, key_strides[2:4], length, shortest, scale, PREFIX, ORDER, E, BLOCK_K, BLOCK_E
        )  # fmt: skip
        lanes = lanes + exp_term(scores, maximum)
        if last:
            groups = tl.where((tl.arange(0, CHUNK) == group)[None, :], _tree_2d(lanes), groups)
            lanes = tl.full([BLOCK_R, BLOCK_K], 0.0, tl.float32)
    total = _tree_2d(groups)

    acc = _product(
        q, key, value, order, key_strides[2:4], value_strides[2:4], maximum, total, length, shortest, scale, K, blocks,
        PLAIN, PREFIX, ORDER, False, E, D, BLOCK_K, BLOCK_E, BLOCK_D,
    )  # fmt: skip
    if MASKED or CAUSAL:
        if _is_lost(acc):
            acc = _product(
                q, key, value, order, key_strides[2:4], value_strides[2:4], maximum, total, length, shortest, scale, K, blocks,
                PLAIN, PREFIX, ORDER, True, E, D, BLOCK_K, BLOCK_E, BLOCK_D,
            )  # fmt: skip
    _store(out, acc, n * R + row, first, R, D, BLOCK_R, BLOCK_D)


@triton.jit
def _lane_scores(scores, row, c0, pitch, LANES: tl.constexpr):
    """Columns [1, 1, LANES] from c0 on, and where the rows' scores [ROWS, 1, LANES] of them are kept."""
    column = (c0 + tl.arange(0, LANES))[None, None, :]
    return column, scores + (row * pitch)[:, None, None] + column


@triton.jit
def _stored_product(
    scores, value, order, strides, local, kept, length, K, end, pitch, CAREFUL: tl.constexpr, ORDER: tl.constexpr,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_D] outputs before they are rounded, of weights in the place of scores."""
    acc = tl.full([BLOCK_R, BLOCK_D], 0.0, tl.float32)
    lost = tl.full([BLOCK_D], 0, tl.int32) + K
    for k0 in range(0, end, BLOCK_K):
        column = (k0 + tl.arange(0, BLOCK_K))[None, :]
        weights = tl.load(scores + local * pitch + column, mask=kept & (column < pitch), other=0.0)
        values = _keys(value, order, k0, K, strides, ORDER, D, BLOCK_K, BLOCK_D)
        if CAREFUL:
            values, lost = _careful(values, k0, lost, K, BLOCK_K)
        acc = tl.dot(weights.to(values.dtype), values, acc)
    if CAREFUL:
        acc = _settled(acc, lost, length)
    return acc


@triton.jit(do_not_specialize=["inner", "R", "K", "queries"])
def attend_stored(
    query, key, value, lengths, order, out, scores, query_strides, key_strides, value_strides, scale, inner, R, K, queries,
    pitch, PREFIX: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, ORDER: tl.constexpr,
    E: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `attend_recomputed`. `scores` is float32 [N, R, pitch], which only the rows' own program reads and writes.

    `pitch` is K rounded up to whole accesses: what stands behind K is no row's. The dot instruction takes BLOCK_R rows, of
    which a block has at most ROWS.
    """
    blocks_r = _cdiv(R, ROWS)
    n = (tl.program_id(0) // blocks_r).to(tl.int64)
    first = tl.program_id(0) % blocks_r * ROWS
    query += _place(n, query_strides[0:2], inner)
    key += _place(n, key_strides[0:2], inner)
    value += _place(n, value_strides[0:2], inner)
    scores += (n * R + first) * pitch
    if ORDER:
        order += n * K
    row = _rows(first, R, BLOCK_R)
    length = _lengths(lengths, n, row, R, K, queries, MASKED, CAUSAL)
    end = -tl.reduce(-length, 0, _smaller)
    q = _queries(query, query_strides[2:5], row, queries, E, BLOCK_E)
    local = tl.arange(0, BLOCK_R)[:, None]
    kept = (local < ROWS) & (first + local < R)
    for k0 in range(0, end, BLOCK_K):
        column = (k0 + tl.arange(0, BLOCK_K))[None, :]
        x = tl.dot(q, _keys(key, order, k0, K, key_strides[2:4], ORDER, E, BLOCK_K, BLOCK_E).T) * scale
        tl.store(scores + local * pitch + column, x, mask=kept & (column < pitch))
    tl.debug_barrier()

    own = tl.arange(0, ROWS)
    inside = (first + own < R)[:, None, None]
    admitted = (_lengths(lengths, n, _rows(first, R, ROWS), R, K, queries, MASKED, CAUSAL)[:, None, None],)
    SHAPE: tl.constexpr = (ROWS, 1, LANES)
    maximum = tl.full(SHAPE, -float("inf"), tl.float32)
    for c0 in range(0, end, LANES):
        column, places = _lane_scores(scores, own, c0, pitch, LANES)
        x = tl.load(places, mask=inside & (column < pitch), other=0.0)
        maximum = larger(maximum, evaluate(PREFIX, "reductions", 0, (x,), admitted, (), column, SHAPE))
    maximum = _extreme(maximum, "sum_exp")
    total = tl.full(SHAPE, 0.0, tl.float32)
    for c0 in range(0, end, LANES):
        column, places = _lane_scores(scores, own, c0, pitch, LANES)
        x = tl.load(places, mask=inside & (column < pitch), other=0.0)
        x = exp_term(evaluate(PREFIX, "reductions", 0, (x,), admitted, (), column, SHAPE), maximum)
        total = total + x
        tl.store(places, x, mask=inside & (column < pitch))
    total = _tree(total)
    for c0 in range(0, end, LANES):
        column, places = _lane_scores(scores, own, c0, pitch, LANES)
        x = tl.load(places, mask=inside & (column < pitch), other=0.0)
        x = evaluate(PREFIX, "factors", 0, (x,), admitted, ((maximum, total, x, 1.0),), column, SHAPE)
        tl.store(places, x, mask=inside & (column < pitch))
    tl.debug_barrier()

    acc = _stored_product(
        scores, value, order, value_strides[2:4], local, kept, length, K, end, pitch, False, ORDER, D, BLOCK_R, BLOCK_K, BLOCK_D
    )  # fmt: skip
    if MASKED or CAUSAL:
        if _is_lost(acc):
            acc = _stored_product(
                scores, value, order, value_strides[2:4], local, kept, length, K, end, pitch, True, ORDER, D, BLOCK_R, BLOCK_K,
                BLOCK_D,
            )  # fmt: skip
    _store(out, acc, n * R + row, first, tl.minimum(R, first + ROWS), D, BLOCK_R, BLOCK_D)
