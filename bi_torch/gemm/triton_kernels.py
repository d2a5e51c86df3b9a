"""Triton kernels of the GEMM: alpha * (A @ B) + beta * bias, one output tile per program step.

Every kernel evaluates the contract's chain for each output: dot instructions over K in ascending order from a +0
accumulator, the tail of K filled with zeros. A tile's shape, its warps and which operand feeds which side of the tensor
core decide which outputs are computed together, never the order of an addition; that is why the bits do not depend on
the schedule. With FINITE an output that is not finite is NaN. The kernels must be compiled with `enable_fp_fusion=False`:
the epilogue's multiplications and additions are rounded one by one.

    gemm_tma       operands read through tensor maps: 16-byte aligned rows, one contiguous dimension
    gemm_pointer   masked loads: any strides, any size
    gemm_split     float32 operands as three bfloat16 parts (`Float32Split`), masked loads
    gemm_split_tma the same, read through tensor maps; `split_rows` may have cut A into its parts before
"""

import triton
import triton.language as tl

from shared_specs import ptx


@triton.jit
def _cdiv(x, BLOCK: tl.constexpr):
    return (x + BLOCK - 1) // BLOCK


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    """A +0 accumulator for one output tile, transposed with SWAP."""
    return tl.full((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), 0.0, tl.float32)


@triton.jit
def _tile(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(m, n) of the index-th output tile: GROUP_M rows of tiles at a time, so that neighbours share B through the L2."""
    group = index // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + index % rows, (index % (GROUP_M * tiles_n)) // rows


@triton.jit
def _bias(bias_ptr, row, col, M, N, stride_m, stride_n):
    """The [BLOCK_M, BLOCK_N] tile of the bias in float32; a stride of 0 broadcasts."""
    offsets = row.to(tl.int64)[:, None] * stride_m + col.to(tl.int64)[None, :] * stride_n
    inside = (row[:, None] < M) & (col[None, :] < N)
    return tl.load(bias_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(out_ptr, value, row, col, M, N, stride_m, stride_n, FINITE: tl.constexpr):
    offsets = row.to(tl.int64)[:, None] * stride_m + col.to(tl.int64)[None, :] * stride_n
    inside = (row[:, None] < M) & (col[None, :] < N)
    tl.store(out_ptr + offsets, _rounded(value, out_ptr.dtype.element_ty, FINITE), mask=inside)


@triton.jit
def _rounded(value, dtype: tl.constexpr, FINITE: tl.constexpr):
    """value in the output's dtype; with FINITE what is not finite then is NaN."""
    rounded = value.to(dtype)
    if FINITE:
        rounded = _finite_or_nan(rounded.to(tl.float32)).to(dtype)
    return rounded


@triton.jit
def _finite_or_nan(x):
    """float32 x, the contract's NaN where it is not finite."""
    return tl.where(_is_finite(x), x, tl.full(x.shape, 0x7FFFFFFF, tl.uint32).to(tl.float32, bitcast=True))


@triton.jit
def _is_finite(x):
    return (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000


@triton.jit
def _epilogue(
    acc, row, col, M, N, bias_ptr, stride_bias_m, stride_bias_n, alpha, beta, SCALE: tl.constexpr, BIAS: tl.constexpr
):
    """alpha * acc + beta * bias, three float32 roundings; SCALE = False is alpha = 1, where the product is exact."""
    if SCALE:
        acc = acc * alpha
    if BIAS:
        acc = acc + _bias(bias_ptr, row, col, M, N, stride_bias_m, stride_bias_n) * beta
    return acc


@triton.jit(do_not_specialize=["M", "N", "K", "stride_out_m", "stride_out_n", "stride_bias_m", "stride_bias_n"])
def gemm_tma(
    a_desc, b_desc, b_rest_desc, out_desc, out_ptr, bias_ptr, alpha, beta, M, N, K,
    stride_out_m, stride_out_n, stride_bias_m, stride_bias_n,
    A_IS_KM: tl.constexpr, B_IS_NK: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, FINITE: tl.constexpr,
    STORE_TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, GROUP_M: tl.constexpr, PIECE_N: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """A program walks over output tiles [BLOCK_M, BLOCK_N + REST_N]; tensor maps zero-fill every edge.

    A is stored [M, K] or (A_IS_KM) [K, M]; B is stored [K, N] or (B_IS_NK) [N, K]. With SWAP the tensor core computes
    the transposed tile, so that few rows of A still fill its 64-row side with columns of B. Triton's tiles are powers of
    two: REST_N, a second and narrower one beside the first, gives widths such as 128 + 64, which fill the last wave of SMs
    where 128 and 256 would leave some idle. Tiles are stored PIECE_N columns at a time.
    """
    tiles_m = _cdiv(M, BLOCK_M)
    tiles_n = _cdiv(N, BLOCK_N + REST_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = _tile(index, tiles_m, tiles_n, GROUP_M)
        m0 = tile_m * BLOCK_M
        n0 = tile_n * (BLOCK_N + REST_N)
        acc = _zeros(BLOCK_M, BLOCK_N, SWAP)
        if REST_N:
            rest = _zeros(BLOCK_M, REST_N, SWAP)
        for k0 in range(0, K, BLOCK_K):
            a = a_desc.load([k0, m0]).T if A_IS_KM else a_desc.load([m0, k0])
            b = b_desc.load([n0, k0]).T if B_IS_NK else b_desc.load([k0, n0])
            acc = tl.dot(b.T, a.T, acc) if SWAP else tl.dot(a, b, acc)
            if REST_N:
                b = b_rest_desc.load([n0 + BLOCK_N, k0]).T if B_IS_NK else b_rest_desc.load([k0, n0 + BLOCK_N])
                rest = tl.dot(b.T, a.T, rest) if SWAP else tl.dot(a, b, rest)
        if SWAP:
            acc = acc.T
        _finish(acc, m0, n0, out_desc, out_ptr, bias_ptr, alpha, beta, M, N, stride_out_m, stride_out_n,
                stride_bias_m, stride_bias_n, SCALE, BIAS, FINITE, STORE_TMA, BLOCK_M, BLOCK_N, PIECE_N)  # fmt: skip
        if REST_N:
            if SWAP:
                rest = rest.T
            _finish(rest, m0, n0 + BLOCK_N, out_desc, out_ptr, bias_ptr, alpha, beta, M, N, stride_out_m, stride_out_n,
                    stride_bias_m, stride_bias_n, SCALE, BIAS, FINITE, STORE_TMA, BLOCK_M, REST_N, PIECE_N)  # fmt: skip


@triton.jit
def _finish(
    acc, m0, n0, out_desc, out_ptr, bias_ptr, alpha, beta, M, N, stride_out_m, stride_out_n, stride_bias_m, stride_bias_n,
    SCALE: tl.constexpr, BIAS: tl.constexpr, FINITE: tl.constexpr, STORE_TMA: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PIECE_N: tl.constexpr,
):  # fmt: skip
    """Epilogue and store of the [ROWS, COLS] tile at (m0, n0), by halves until a half is PIECE_N wide."""
    if COLS > PIECE_N:
        left, right = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLS // 2)), (0, 2, 1)))
        _finish(left, m0, n0, out_desc, out_ptr, bias_ptr, alpha, beta, M, N, stride_out_m, stride_out_n,
                stride_bias_m, stride_bias_n, SCALE, BIAS, FINITE, STORE_TMA, ROWS, COLS // 2, PIECE_N)  # fmt: skip
        _finish(right, m0, n0 + COLS // 2, out_desc, out_ptr, bias_ptr, alpha, beta, M, N, stride_out_m, stride_out_n,
                stride_bias_m, stride_bias_n, SCALE, BIAS, FINITE, STORE_TMA, ROWS, COLS // 2, PIECE_N)  # fmt: skip
    else:
        row = m0 + tl.arange(0, ROWS)
        col = n0 + tl.arange(0, COLS)
        value = _epilogue(acc, row, col, M, N, bias_ptr, stride_bias_m, stride_bias_n, alpha, beta, SCALE, BIAS)
        if STORE_TMA:
            out_desc.store([m0, n0], _rounded(value, out_desc.dtype, FINITE))
        else:
            _store(out_ptr, value, row, col, M, N, stride_out_m, stride_out_n, FINITE)


@triton.jit
def _offsets(base, extent, BLOCK: tl.constexpr):
    offsets = base + tl.arange(0, BLOCK)
    return offsets, offsets < extent


@triton.jit
def _load_a(rows, row_inside, k0, K, stride_k, BLOCK_K: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of A, zeros beyond its edges."""
    k, k_inside = _offsets(k0, K, BLOCK_K)
    return tl.load(rows + k.to(tl.int64)[None, :] * stride_k, mask=row_inside[:, None] & k_inside[None, :], other=0.0)


@triton.jit
def _load_b(cols, col_inside, k0, K, stride_k, BLOCK_K: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of B, zeros beyond its edges."""
    k, k_inside = _offsets(k0, K, BLOCK_K)
    return tl.load(cols + k.to(tl.int64)[:, None] * stride_k, mask=k_inside[:, None] & col_inside[None, :], other=0.0)


@triton.jit
def _batch_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(batch entry, m, n) of this program's tile."""
    tiles_m = _cdiv(M, BLOCK_M)
    tiles_n = _cdiv(N, BLOCK_N)
    index = tl.program_id(0)
    tile_m, tile_n = _tile(index % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    return (index // (tiles_m * tiles_n)).to(tl.int64), tile_m, tile_n


@triton.jit
def gemm_pointer(
    a_ptr, b_ptr, out_ptr, bias_ptr, alpha, beta, M, N, K,
    stride_a_b, stride_a_m, stride_a_k, stride_b_b, stride_b_k, stride_b_n, stride_out_b, stride_out_m, stride_out_n,
    stride_bias_b, stride_bias_m, stride_bias_n,
    SCALE: tl.constexpr, BIAS: tl.constexpr, FINITE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One output tile [BLOCK_M, BLOCK_N] of one batch entry a program; masked loads fill every edge with zeros."""
    batch, tile_m, tile_n = _batch_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, row_inside = _offsets(tile_m * BLOCK_M, M, BLOCK_M)
    col, col_inside = _offsets(tile_n * BLOCK_N, N, BLOCK_N)
    a_rows = a_ptr + batch * stride_a_b + row.to(tl.int64)[:, None] * stride_a_m
    b_cols = b_ptr + batch * stride_b_b + col.to(tl.int64)[None, :] * stride_b_n
    acc = _zeros(BLOCK_M, BLOCK_N, SWAP)
    for k0 in range(0, K, BLOCK_K):
        a = _load_a(a_rows, row_inside, k0, K, stride_a_k, BLOCK_K)
        b = _load_b(b_cols, col_inside, k0, K, stride_b_k, BLOCK_K)
        acc = tl.dot(b.T, a.T, acc) if SWAP else tl.dot(a, b, acc)
    if SWAP:
        acc = acc.T
    if BIAS:
        bias_ptr += batch * stride_bias_b
    value = _epilogue(acc, row, col, M, N, bias_ptr, stride_bias_m, stride_bias_n, alpha, beta, SCALE, BIAS)
    _store(out_ptr + batch * stride_out_b, value, row, col, M, N, stride_out_m, stride_out_n, FINITE)


SPLIT: tl.constexpr = tl.constexpr(ptx.SPLIT)
SPLIT_REGISTERS: tl.constexpr = tl.constexpr(ptx.SPLIT_REGISTERS)


@triton.jit
def _split(x):
    """The three bfloat16 parts of float32 x, largest first.

    Parts 1 and 2 of an infinity or a NaN are NaN here and zero in the contract. They enter the cross sum only, which does not
    count where the high sum is not finite; and there it is not.
    """
    return tl.inline_asm_elementwise(
        SPLIT, SPLIT_REGISTERS, [x], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
    )


@triton.jit
def _chains(a, b, CROSS: tl.constexpr, SWAP: tl.constexpr):
    """The two chains of every chunk, from the parts of A [C, M, k] and B [C, k, N]: that of the high parts and the crossed one.

    All chunks' chains run side by side; [C, M, N], or [C, N, M] with SWAP.
    """
    high = _dot(a[0], b[0], None, SWAP)
    cross = _dot(a[CROSS[0][0]], b[CROSS[0][1]], None, SWAP)
    for product in tl.static_range(1, len(CROSS)):
        cross = _dot(a[CROSS[product][0]], b[CROSS[product][1]], cross, SWAP)
    return high, cross


@triton.jit
def _dot(a, b, acc, SWAP: tl.constexpr):
    if SWAP:
        return tl.dot(_transposed(b), _transposed(a), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _transposed(x):
    return tl.permute(x, (0, 2, 1)) if len(x.shape) == 3 else x.T


@triton.jit
def _promote(high, cross, high_chain, cross_chain, CHUNKS: tl.constexpr):
    """Add the chains of CHUNKS chunks to the two sums, in ascending order.

    The first sum is written fma(chain, 1, sum), one rounding: an addition would become the dot's accumulator.
    """
    if CHUNKS == 1:
        high_chain = tl.reshape(high_chain, high.shape)
        total = tl.fma(high_chain, 1.0, high)
        error = high_chain - (total - high)
        return total, cross + (tl.reshape(cross_chain, cross.shape) + error)
    else:
        high_first, high_second = _halves(high_chain, CHUNKS)
        cross_first, cross_second = _halves(cross_chain, CHUNKS)
        high, cross = _promote(high, cross, high_first, cross_first, CHUNKS // 2)
        return _promote(high, cross, high_second, cross_second, CHUNKS // 2)


@triton.jit
def _halves(x, CHUNKS: tl.constexpr):
    """The first and the second half of the chunks of x [CHUNKS, rows, cols]."""
    return tl.split(tl.permute(tl.reshape(x, (2, CHUNKS // 2, x.shape[1], x.shape[2])), (1, 2, 3, 0)))


@triton.jit
def gemm_split(
    a_ptr, b_ptr, out_ptr, bias_ptr, alpha, beta, M, N, K,
    stride_a_b, stride_a_m, stride_a_k, stride_b_b, stride_b_k, stride_b_n, stride_out_b, stride_out_m, stride_out_n,
    stride_bias_b, stride_bias_m, stride_bias_n,
    CROSS: tl.constexpr, CHUNK_K: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, FINITE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As `gemm_pointer`, for float32 operands; CHUNK_K is the contract's promote_k, CROSS its part products.

    A step takes BLOCK_K // CHUNK_K chunks of K: their chains are independent, which hides the latency of each.
    """
    batch, tile_m, tile_n = _batch_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, row_inside = _offsets(tile_m * BLOCK_M, M, BLOCK_M)
    col, col_inside = _offsets(tile_n * BLOCK_N, N, BLOCK_N)
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK_K
    k_in_step = tl.arange(0, CHUNKS)[:, None] * CHUNK_K + tl.arange(0, CHUNK_K)[None, :]
    a_rows = a_ptr + batch * stride_a_b + row.to(tl.int64)[None, :, None] * stride_a_m
    b_cols = b_ptr + batch * stride_b_b + col.to(tl.int64)[None, None, :] * stride_b_n
    high = _zeros(BLOCK_M, BLOCK_N, SWAP)
    cross = _zeros(BLOCK_M, BLOCK_N, SWAP)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + k_in_step
        a_inside = row_inside[None, :, None] & (k < K)[:, None, :]
        b_inside = (k < K)[:, :, None] & col_inside[None, None, :]
        a = tl.load(a_rows + k.to(tl.int64)[:, None, :] * stride_a_k, mask=a_inside, other=0.0)
        b = tl.load(b_cols + k.to(tl.int64)[:, :, None] * stride_b_k, mask=b_inside, other=0.0)
        if CHUNKS == 1:
            a = tl.reshape(a, (BLOCK_M, CHUNK_K))
            b = tl.reshape(b, (CHUNK_K, BLOCK_N))
        high_chain, cross_chain = _chains(_split(a), _split(b), CROSS, SWAP)
        high, cross = _promote(high, cross, high_chain, cross_chain, CHUNKS)
    acc = tl.where(_is_finite(high), high + cross, high)
    if SWAP:
        acc = acc.T
    if BIAS:
        bias_ptr += batch * stride_bias_b
    value = _epilogue(acc, row, col, M, N, bias_ptr, stride_bias_m, stride_bias_n, alpha, beta, SCALE, BIAS)
    _store(out_ptr + batch * stride_out_b, value, row, col, M, N, stride_out_m, stride_out_n, FINITE)


@triton.jit(do_not_specialize=["rows", "K"])
def split_rows(x_ptr, parts_ptr, rows, K, stride_m, stride_k, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """The parts of float32 x [rows, K], to [3, rows, K rounded up to a multiple of UNIT]; zeros beyond K."""
    blocks = _cdiv(K, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    pitch = _cdiv(K, UNIT) * UNIT
    parts = _split(tl.load(x_ptr + row * stride_m + k.to(tl.int64) * stride_k, mask=k < K, other=0.0))
    for part in tl.static_range(3):
        tl.store(parts_ptr + (part * rows.to(tl.int64) + row) * pitch + k, parts[part], mask=k < pitch)


@triton.jit(do_not_specialize=["M", "N", "K", "stride_out_m", "stride_out_n", "stride_bias_m", "stride_bias_n"])
def gemm_split_tma(
    a_desc, b_desc, out_ptr, bias_ptr, alpha, beta, M, N, K, stride_out_m, stride_out_n, stride_bias_m, stride_bias_n,
    CROSS: tl.constexpr, CHUNK_K: tl.constexpr, SPLIT_A: tl.constexpr, A_IS_KM: tl.constexpr, B_IS_NK: tl.constexpr,
    SCALE: tl.constexpr, BIAS: tl.constexpr, FINITE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As `gemm_split`, for one batch entry whose operands tensor maps describe, as in `gemm_tma`; they zero-fill every edge.

    With SPLIT_A, A arrives as the parts that `split_rows` makes, one below the other. A tile that reaches past the last row
    of a part reads on in the next; what comes of those rows is not stored.
    """
    tile_m, tile_n = _tile(tl.program_id(0), _cdiv(M, BLOCK_M), _cdiv(N, BLOCK_N), GROUP_M)
    m0 = tile_m * BLOCK_M
    n0 = tile_n * BLOCK_N
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK_K
    high = _zeros(BLOCK_M, BLOCK_N, SWAP)
    cross = _zeros(BLOCK_M, BLOCK_N, SWAP)
    for k0 in range(0, K, BLOCK_K):
        b = b_desc.load([n0, k0]).T if B_IS_NK else b_desc.load([k0, n0])
        b_parts = _split(_row_chunks(b, CHUNKS))
        if SPLIT_A:
            first = _column_chunks(a_desc.load([m0, k0]), CHUNKS)
            second = _column_chunks(a_desc.load([M + m0, k0]), CHUNKS)
            third = _column_chunks(a_desc.load([2 * M + m0, k0]), CHUNKS)
            high_chain, cross_chain = _chains((first, second, third), b_parts, CROSS, SWAP)
        else:
            a = a_desc.load([k0, m0]).T if A_IS_KM else a_desc.load([m0, k0])
            high_chain, cross_chain = _chains(_split(_column_chunks(a, CHUNKS)), b_parts, CROSS, SWAP)
        high, cross = _promote(high, cross, high_chain, cross_chain, CHUNKS)
    acc = tl.where(_is_finite(high), high + cross, high)
    if SWAP:
        acc = acc.T
    row = m0 + tl.arange(0, BLOCK_M)
    col = n0 + tl.arange(0, BLOCK_N)
    value = _epilogue(acc, row, col, M, N, bias_ptr, stride_bias_m, stride_bias_n, alpha, beta, SCALE, BIAS)
    _store(out_ptr, value, row, col, M, N, stride_out_m, stride_out_n, FINITE)


@triton.jit
def _row_chunks(x, CHUNKS: tl.constexpr):
    """x [K, cols] as [CHUNKS, k, cols], or as it is if that is one chunk."""
    return x if CHUNKS == 1 else tl.reshape(x, (CHUNKS, x.shape[0] // CHUNKS, x.shape[1]))


@triton.jit
def _column_chunks(x, CHUNKS: tl.constexpr):
    """x [rows, K] as [CHUNKS, rows, k], or as it is if that is one chunk."""
    return x if CHUNKS == 1 else tl.permute(tl.reshape(x, (x.shape[0], CHUNKS, x.shape[1] // CHUNKS)), (1, 0, 2))
