"""Triton kernels of the row programs: generic code that evaluates a program's formulas in the order of `RowContract`.

A row is seen as [segments, chunks, lanes]. A *tile* is [BLOCK_ROWS, SEGMENTS, PIECE]: some rows, some of their segments, and
a piece of the lanes; a tuple of tiles, piece by piece and chunk by chunk, covers whole segments, so that

    the chain over chunks    is an addition of tiles, whatever the layout of a tile over threads,
    the tree over lanes      is `_tree`: reductions of exactly two numbers, whose order cannot matter,
    the tree over segments   is the same tree over the segments' results.

That is why no schedule changes a bit. Loads beyond a row give 0, and what a formula makes of them is replaced by the
neutral element; the first FULL chunks of a tile never reach beyond a row. Rows beyond the last one repeat it and are not
stored. The kernels must be compiled with `enable_fp_fusion=False`.

    rows_resident   a row stays in registers: it is read once
    rows_staged     one stage for each reduction and one for the outputs; each reads the row again, segment by segment
    combine         shrinks the segments' results of very long rows between two stages
    pointwise       programs of elements and scalars alone, on flat memory
    column_sums     sums over rows: a block of columns, an aligned group of lanes, which is a subtree of its own
    column_tree     finishes the tree over groups and segments

N and the strides come in units of UNIT elements, from which the compiler knows how wide an access may be.
"""

import triton
import triton.language as tl

from bi_torch.rows.triton_arithmetic import (
    canonical,
    element_of,
    evaluate,
    exp_term,
    kind_of,
    larger,
    last_reading_stage,
    near,
    near_exp_term,
    reads_elements,
    reads_terms,
    reduction_count,
    rescaled,
    smaller,
    weight,
)
from shared_specs import ptx

WIDEN: tl.constexpr = tl.constexpr(ptx.WIDEN)
WIDEN_REGISTERS: tl.constexpr = tl.constexpr(ptx.WIDEN_REGISTERS)


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.constexpr_function
def _fill(kind):
    """What a reduction makes of an element that is not there."""
    return {"sum": 0.0, "max": -float("inf"), "min": float("inf"), "sum_exp": -float("inf")}[kind]


@triton.jit
def _cdiv(x, block):
    return (x + block - 1) // block


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def _larger(x, y):
    return larger(x, y)


@triton.jit
def _smaller(x, y):
    return smaller(x, y)


@triton.jit
def _chain(values):
    """A tuple's sum, added one by one to +0."""
    total = values[0] + 0.0
    for i in tl.static_range(1, len(values)):
        total = total + values[i]
    return total


@triton.jit
def _tree(x):
    """[A, B, L] to [A, B, 1]: sums of adjacent pairs, of pairs of these, and so on."""
    for _level in tl.static_range(_log2(x.shape[2])):
        pairs = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2])
        x = tl.reduce(pairs, 3, _add)
    return x


@triton.jit
def _tree_of(values):
    """The same tree over a tuple."""
    for _level in tl.static_range(_log2(len(values))):
        sums = ()
        for i in tl.static_range(len(values) // 2):
            sums = sums + (values[2 * i] + values[2 * i + 1],)
        values = sums
    return values[0]


@triton.jit
def _extreme(x, KIND: tl.constexpr):
    """[A, B, L] to [A, B, 1]: the maximum or the minimum, in any order."""
    if KIND == "min":
        return tl.reduce(x, 2, _smaller, keep_dims=True)
    else:
        return tl.reduce(x, 2, _larger, keep_dims=True)


@triton.jit
def _store(pointer, value, mask, EVICTION: tl.constexpr):
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask, eviction_policy=EVICTION)


@triton.jit
def _per_row(x):
    """A number for each row of a block, [BLOCK_ROWS] or a scalar, in a shape that broadcasts to a tile's."""
    if len(x.shape) == 0:
        return x
    else:
        return x[:, None, None]


@triton.jit
def _row_pointers(pointers, strides, row, UNIT: tl.constexpr):
    """The first element of each row of each matrix."""
    result = ()
    for i in tl.static_range(len(pointers)):
        result = result + (pointers[i] + row * strides[i] * UNIT,)
    return result


@triton.jit
def _row_values(row, pointers, rows, ids, scalars, integers, N, GATHERED: tl.constexpr):
    """What a formula reads once a row: numbers of the row, scalars, gathered elements and the count.

    Loads are one-dimensional: in the layout of a tile, a thread would read the same number for each of its columns.
    """
    values = ()
    for i in tl.static_range(len(rows)):
        values = values + (_per_row(tl.load(rows[i] + row)),)
    for i in tl.static_range(len(ids)):
        # An id that no int32 holds is none of the row's.
        wide = tl.load(ids[i] + row).to(tl.int64)
        values = values + (_per_row(tl.minimum(tl.maximum(wide, -(2**31)), 2**31 - 1).to(tl.int32)),)
    values = values + scalars + integers
    for i in tl.static_range(len(GATHERED)):
        column = tl.load(ids[GATHERED[i][1]] + row).to(tl.int64)
        inside = (column >= 0) & (column < N)
        chosen = tl.load(pointers[GATHERED[i][0]] + tl.where(inside, column, 0), mask=inside, other=float("nan"))
        values = values + (_per_row(chosen.to(tl.float32)),)
    return values + (N.to(tl.float32),)


@triton.jit
def _column(base, chunk: tl.constexpr, piece: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr):
    """[1, SEGMENTS, PIECE] column numbers from the segments' first ones."""
    return base + (chunk * LANES + piece * PIECE) + tl.arange(0, PIECE)[None, None, :]


@triton.jit
def _load_tile(pointers, column, N, BLOCK_ROWS: tl.constexpr, MASKED: tl.constexpr, EVICTION: tl.constexpr):
    """What is read at every pointer for some columns.

    Inputs [N] are read for each row too: a thread then reads them as wide as the rows, in the layout of the rows.
    """
    column = tl.broadcast_to(column, [BLOCK_ROWS, column.shape[1], column.shape[2]])
    tile = ()
    for i in tl.static_range(len(pointers)):
        if MASKED:
            value = tl.load(_per_row(pointers[i]) + column, mask=column < N, other=0.0, eviction_policy=EVICTION)
        else:
            value = tl.load(_per_row(pointers[i]) + column, eviction_policy=EVICTION)
        tile = tile + (value,)
    return tile


@triton.jit
def _opaque(x, PACK: tl.constexpr):
    """x, PACK elements a register, from an instruction of which the compiler does not know that it copies."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=False, pack=PACK)


@triton.jit
def _numbers(tile, PACKED: tl.constexpr):
    """A tile as float32.

    A PACKED one keeps its 16-bit elements two to a register and is converted wherever it is read: the instruction hides that
    they are the same elements, or the compiler would convert them once and hold twice the registers.
    """
    result = ()
    for i in tl.static_range(len(tile)):
        if PACKED and tile[i].dtype != tl.float32:
            result = result + (_opaque(tile[i], 2).to(tl.float32),)
        else:
            result = result + (tile[i].to(tl.float32),)
    return result


@triton.jit
def _load(
    pointers, base, N, BLOCK_ROWS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr,
    FULL: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Tiles piece by piece and, in a piece, chunk by chunk."""
    tiles = ()
    for piece in tl.static_range(LANES // PIECE):
        for chunk in tl.static_range(CHUNKS):
            column = _column(base, chunk, piece, LANES, PIECE)
            tiles = tiles + (_load_tile(pointers, column, N, BLOCK_ROWS, chunk >= FULL, EVICTION),)
    return tiles


@triton.jit
def _reduced_values(
    FORMULAS: tl.constexpr, INDEX: tl.constexpr, tiles, shared, row_values, reduced, base, N,
    BLOCK_ROWS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr, FULL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """What reduction INDEX is over, for every tile."""
    SHAPE: tl.constexpr = (BLOCK_ROWS, base.shape[1], PIECE)
    values = ()
    for piece in tl.static_range(LANES // PIECE):
        for chunk in tl.static_range(CHUNKS):
            column = _column(base, chunk, piece, LANES, PIECE)
            tile = _numbers(tiles[piece * CHUNKS + chunk], PACKED) + _numbers(shared[piece * CHUNKS + chunk], False)
            value = evaluate(FORMULAS, "reductions", INDEX, tile, row_values, reduced, column.to(tl.int32), SHAPE)
            if chunk >= FULL:
                value = tl.where(column < N, value, _fill(kind_of(FORMULAS, INDEX)))
            values = values + (value,)
    return values


@triton.jit
def _pairwise(x, y, KIND: tl.constexpr):
    """The larger or smaller elements of tiles of 16-bit floats, two at a time; NaN wins."""
    TYPE: tl.constexpr = "bf16x2" if x.dtype == tl.bfloat16 else "f16x2"
    TEXT: tl.constexpr = KIND + ".NaN." + TYPE + " $0, $1, $2;"
    return tl.inline_asm_elementwise(TEXT, "=r,r,r", [x, y], x.dtype, is_pure=True, pack=2)


@triton.jit
def _widened(x):
    """`_numbers` of one PACKED tile, bfloat16 by fewer instructions: it pays where exponentials follow."""
    if x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(WIDEN, WIDEN_REGISTERS, [x], tl.float32, is_pure=False, pack=2)
    else:
        return _numbers((x,), True)[0]


@triton.jit
def _terms(
    tiles, base, N, maximum, NEAR: tl.constexpr, KEEP: tl.constexpr,
    ELEMENT: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The chains over chunks of a sum of exponentials by pieces; and its terms by tiles, where to KEEP."""
    sums, terms = (), ()
    for i in tl.static_range(len(tiles)):
        x = _widened(tiles[i][ELEMENT])
        inside = _column(base, i % CHUNKS, i // CHUNKS, LANES, PIECE) < N
        if NEAR:
            term = near_exp_term(x, maximum)
            if i % CHUNKS >= FULL:
                term = tl.where(inside, term, 0.0)
        else:
            if i % CHUNKS >= FULL:
                x = tl.where(inside, x, -float("inf"))
            term = exp_term(x, maximum)
        terms = terms + (term,)
    for piece in tl.static_range(len(terms) // CHUNKS):
        total = _chain(terms[piece * CHUNKS : (piece + 1) * CHUNKS])
        if NEAR:  # or the compiler would add up behind the branch, where it would hold every term
            total = _opaque(total.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
        sums = sums + (total,)
    if KEEP:
        return sums, terms
    else:
        return sums, ()


@triton.jit
def _narrow_sum_exp(
    tiles, base, N, KEEP: tl.constexpr,
    ELEMENT: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """As `_segment_results`, of a segment of 16-bit elements: they are compared as they are, and most segments are near."""
    largest = tiles[0][ELEMENT]
    smallest = largest
    for i in tl.static_range(len(tiles)):
        x = tiles[i][ELEMENT]
        smallest = _pairwise(smallest, x, "min")  # zeros behind the row's end may be the smallest
        if i % CHUNKS >= FULL:
            inside = _column(base, i % CHUNKS, i // CHUNKS, LANES, PIECE) < N
            x = tl.where(inside, x.to(tl.float32), -float("inf")).to(x.dtype)
        largest = x if i == 0 else _pairwise(largest, x, "max")
    maximum = _extreme(largest.to(tl.float32), "max")
    minimum = _extreme(smallest.to(tl.float32), "min")
    if tl.reshape(near(tl.reshape(minimum, [1]), tl.reshape(maximum, [1])), []):
        sums, terms = _terms(tiles, base, N, maximum, True, KEEP, ELEMENT, CHUNKS, LANES, PIECE, FULL)
    else:
        sums, terms = _terms(tiles, base, N, maximum, False, KEEP, ELEMENT, CHUNKS, LANES, PIECE, FULL)
    return (maximum, _lane_sums(sums, 1)), terms


@triton.jit
def _segment_results(
    FORMULAS: tl.constexpr, INDEX: tl.constexpr, tiles, columns, row_values, reduced, base, N,
    BLOCK_ROWS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr, FULL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """What reduction INDEX makes of each segment, a tuple of [BLOCK_ROWS, SEGMENTS, 1]; and the terms of a sum_exp by tiles."""
    KIND: tl.constexpr = kind_of(FORMULAS, INDEX)
    ELEMENT: tl.constexpr = element_of(FORMULAS, INDEX)
    NARROW: tl.constexpr = ELEMENT >= 0 and tiles[0][ELEMENT].dtype.primitive_bitwidth == 16
    if KIND == "sum_exp" and NARROW and BLOCK_ROWS == 1 and base.shape[1] == 1 and PIECE > 1:  # there is a pair
        return _narrow_sum_exp(tiles, base, N, reads_terms(FORMULAS, INDEX), ELEMENT, CHUNKS, LANES, PIECE, FULL)
    else:
        return _wide_results(
            FORMULAS, INDEX, tiles, columns, row_values, reduced, base, N, BLOCK_ROWS, CHUNKS, LANES, PIECE, FULL, PACKED
        )


@triton.jit
def _wide_results(
    FORMULAS: tl.constexpr, INDEX: tl.constexpr, tiles, columns, row_values, reduced, base, N,
    BLOCK_ROWS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr, FULL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The same by formulas in float32."""
    KIND: tl.constexpr = kind_of(FORMULAS, INDEX)
    shared = _load(columns, base, N, BLOCK_ROWS, CHUNKS, LANES, PIECE, FULL, "evict_last")
    values = _reduced_values(
        FORMULAS, INDEX, tiles, shared, row_values, reduced, base, N, BLOCK_ROWS, CHUNKS, LANES, PIECE, FULL, PACKED
    )
    if KIND == "sum":
        return (_lane_sums(values, CHUNKS),), ()
    else:
        extreme = values[0]
        for i in tl.static_range(1, len(values)):
            extreme = smaller(extreme, values[i]) if KIND == "min" else larger(extreme, values[i])
        extreme = _extreme(extreme, KIND)
        if KIND == "sum_exp":
            if PACKED:
                values = _reduced_values(
                    FORMULAS, INDEX, tiles, shared, row_values, reduced, base, N, BLOCK_ROWS, CHUNKS, LANES, PIECE, FULL, True
                )
            terms = ()
            for i in tl.static_range(len(values)):
                terms = terms + (exp_term(values[i], extreme),)
            return (extreme, _lane_sums(terms, CHUNKS)), terms
        else:
            return (extreme,), ()


@triton.jit
def _weights(segment_max, row_max):
    """`sum_exp.weight` of each segment; that of a single one is a scalar, as `_row_result` is."""
    if segment_max.shape[0] == 1 and segment_max.shape[1] == 1:
        return weight(tl.reshape(tl.reshape(segment_max, [1]), []), row_max)
    else:
        return weight(segment_max, row_max)


@triton.jit
def _with_terms(
    FORMULAS: tl.constexpr, reduced, of_segments, tile, row_values, column, TILE: tl.constexpr, SHAPE: tl.constexpr
):  # fmt: skip
    """The reductions as outputs read them: sums of exponentials go on with the term and the weight of each element."""
    result = ()
    for i in tl.static_range(len(reduced)):
        state = reduced[i]
        if reads_terms(FORMULAS, i):
            weights, maxima, terms = of_segments[i]
            if len(terms) > 0:
                term = terms[TILE]
            else:
                term = exp_term(evaluate(FORMULAS, "reductions", i, tile, row_values, reduced, column, SHAPE), maxima)
            state = state + (term, weights)
        result = result + (state,)
    return result


@triton.jit
def _lane_sums(values, CHUNKS: tl.constexpr):
    """The chain over chunks, then the tree over lanes: first within a piece, then over pieces."""
    pieces = ()
    for piece in tl.static_range(len(values) // CHUNKS):
        pieces = pieces + (_tree(_chain(values[piece * CHUNKS : (piece + 1) * CHUNKS])),)
    return _tree_of(pieces)


@triton.jit
def _row_result(KIND: tl.constexpr, results):
    """The segments' results [A, 1, SEGMENTS] as the row's: a tuple of [A, 1, 1].

    The result of one row is a scalar. It must have no layout: Triton might give it to the tiles that it is broadcast to.
    """
    if results[0].shape[2] == 1:
        combined = results
    elif KIND == "sum":
        combined = (_tree(results[0]),)
    elif KIND == "sum_exp":
        maximum = _extreme(results[0], KIND)
        combined = (maximum, _tree(rescaled(results[0], results[1], maximum)))
    else:
        combined = (_extreme(results[0], KIND),)
    if results[0].shape[0] == 1:
        scalars = ()
        for i in tl.static_range(len(combined)):
            scalars = scalars + (tl.reshape(tl.reshape(combined[i], [1]), []),)
        return scalars
    else:
        return combined


@triton.jit
def _transposed(results):
    """[A, SEGMENTS, 1] as [A, 1, SEGMENTS]."""
    result = ()
    for i in tl.static_range(len(results)):
        result = result + (tl.reshape(results[i], [results[i].shape[0], 1, results[i].shape[1]]),)
    return result


@triton.jit
def _store_outputs(
    FORMULAS: tl.constexpr, outputs, tiles, columns, row_values, reduced, of_segments, base, row, R, N,
    BLOCK_ROWS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr, FULL: tl.constexpr,
    PACKED: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Every output of the program for the columns of the tiles.

    Inputs [N] are read again, one tile ahead of their use, rather than held in registers since the reductions. `of_segments`
    has for each reduction whose terms outputs read the segments' weights and maxima, and the terms by tiles: those stay in
    registers, in the place of elements that only reductions read. Where there are none, they are computed again.
    """
    SHAPE: tl.constexpr = (BLOCK_ROWS, base.shape[1], PIECE)
    column = _column(base, 0, 0, LANES, PIECE)
    following = _load_tile(columns, column, N, BLOCK_ROWS, FULL == 0, "evict_last")
    for piece in tl.static_range(LANES // PIECE):
        for chunk in tl.static_range(CHUNKS):
            tile = _numbers(tiles[piece * CHUNKS + chunk], PACKED and reads_elements(FORMULAS)) + _numbers(following, False)
            here = column
            results = _with_terms(
                FORMULAS, reduced, of_segments, tile, row_values, here.to(tl.int32), piece * CHUNKS + chunk, SHAPE
            )
            if chunk + 1 < CHUNKS:
                column = _column(base, chunk + 1, piece, LANES, PIECE)
                following = _load_tile(columns, column, N, BLOCK_ROWS, chunk + 1 >= FULL, "evict_last")
            elif piece + 1 < LANES // PIECE:
                column = _column(base, 0, piece + 1, LANES, PIECE)
                following = _load_tile(columns, column, N, BLOCK_ROWS, FULL == 0, "evict_last")
            for i in tl.static_range(len(outputs)):
                value = evaluate(FORMULAS, "outputs", i, tile, row_values, results, here.to(tl.int32), SHAPE)
                if chunk >= FULL:
                    if BLOCK_ROWS == 1:
                        _store(_per_row(outputs[i]) + here, value, here < N, EVICTION)
                    else:
                        _store(_per_row(outputs[i]) + here, value, _per_row(row < R) & (here < N), EVICTION)
                elif BLOCK_ROWS == 1:
                    _store(_per_row(outputs[i]) + here, value, None, EVICTION)
                else:
                    _store(_per_row(outputs[i]) + here, value, _per_row(row < R), EVICTION)


@triton.jit
def _store_row_outputs(FORMULAS: tl.constexpr, row_outputs, row_values, reduced, row, R, BLOCK_ROWS: tl.constexpr):
    for i in tl.static_range(len(row_outputs)):
        if BLOCK_ROWS == 1:
            _store(row_outputs[i] + row, evaluate(FORMULAS, "row_outputs", i, (), row_values, reduced, None, ()), None, "")
        else:
            value = evaluate(FORMULAS, "row_outputs", i, (), row_values, reduced, None, (BLOCK_ROWS, 1, 1))
            _store(row_outputs[i] + row, tl.reshape(value, [BLOCK_ROWS]), row < R, "")


@triton.jit
def _rows(block, BLOCK_ROWS: tl.constexpr):
    """The numbers of a block's rows: [BLOCK_ROWS], or a scalar where that is 1."""
    if BLOCK_ROWS == 1:
        return block.to(tl.int64)
    else:
        return block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)


@triton.jit
def _resident(
    block, elements, strides, columns, rows, ids, scalars, integers, outputs, output_strides, row_outputs, R, N,
    FORMULAS: tl.constexpr, GATHERED: tl.constexpr, UNIT: tl.constexpr, FULL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, SEGMENTS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """One block of rows of `rows_resident`."""
    base = tl.arange(0, SEGMENTS)[None, :, None] * SEGMENT
    row = _rows(block, BLOCK_ROWS)
    source = tl.minimum(row, R - 1)
    pointers = _row_pointers(elements, strides, source, UNIT)
    tiles = _load(pointers, base, N, BLOCK_ROWS, CHUNKS, LANES, PIECE, FULL, "evict_first")
    row_values = _row_values(source, pointers, rows, ids, scalars, integers, N, GATHERED)
    reduced, of_segments = (), ()
    for i in tl.static_range(reduction_count(FORMULAS)):
        results, terms = _segment_results(
            FORMULAS, i, tiles, columns, row_values, reduced, base, N, BLOCK_ROWS, CHUNKS, LANES, PIECE, FULL, SEGMENTS > 1
        )
        reduced = reduced + (_row_result(kind_of(FORMULAS, i), _transposed(results)),)
        weights = _weights(results[0], reduced[i][0]) if SEGMENTS > 1 and reads_terms(FORMULAS, i) else 1.0
        of_segments = of_segments + ((weights, results[0], terms),)
    targets = _row_pointers(outputs, output_strides, row, UNIT)
    _store_outputs(
        FORMULAS, targets, tiles, columns, row_values, reduced, of_segments, base, row, R, N, BLOCK_ROWS, CHUNKS, LANES, PIECE,
        FULL, SEGMENTS > 1, "",
    )  # fmt: skip
    _store_row_outputs(FORMULAS, row_outputs, row_values, reduced, row, R, BLOCK_ROWS)


@triton.jit(do_not_specialize=["strides", "output_strides", "integers", "R", "N"])
def rows_resident(
    elements, strides, columns, rows, ids, scalars, integers, outputs, output_strides, row_outputs, R, N,
    FORMULAS: tl.constexpr, GATHERED: tl.constexpr, UNIT: tl.constexpr, FULL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, SEGMENTS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr,
    SEGMENT: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_ROWS whole rows at a time, SEGMENTS x CHUNKS x LANES >= N elements of each, from loads to stores in registers.

    With PERSISTENT a program walks over blocks of rows.
    """
    if PERSISTENT:
        first = tl.program_id(0)
        for offset in range(0, _cdiv(R, BLOCK_ROWS) - first, tl.num_programs(0)):
            _resident(
                first + offset, elements, strides, columns, rows, ids, scalars, integers, outputs, output_strides, row_outputs,
                R, N * UNIT, FORMULAS, GATHERED, UNIT, FULL, BLOCK_ROWS, SEGMENTS, CHUNKS, LANES, PIECE, SEGMENT,
            )  # fmt: skip
    else:
        _resident(
            tl.program_id(0), elements, strides, columns, rows, ids, scalars, integers, outputs, output_strides, row_outputs,
            R, N * UNIT, FORMULAS, GATHERED, UNIT, FULL, BLOCK_ROWS, SEGMENTS, CHUNKS, LANES, PIECE, SEGMENT,
        )  # fmt: skip


@triton.jit
def _finished(KIND: tl.constexpr, partials, row, count, COUNT: tl.constexpr):
    """A row's result from those of its `count` segments in memory; COUNT is a power of two that holds them."""
    index = tl.arange(0, COUNT)[None, None, :]
    results = ()
    for i in tl.static_range(len(partials)):
        fill = 0.0 if i == 1 else _fill(KIND)
        pointers = partials[i] + _per_row(row) * count + index
        results = results + (tl.load(pointers, mask=index < count, other=fill),)
    return _row_result(KIND, results)


@triton.jit(
    do_not_specialize=["strides", "output_strides", "integers", "R", "N", "segments", "count", "blocks_per_row"],
    do_not_specialize_on_alignment=["partials", "finished"],
)
def rows_staged(
    elements, strides, columns, rows, ids, scalars, integers, outputs, output_strides, row_outputs, partials, finished,
    R, N, segments, count, blocks_per_row,
    FORMULAS: tl.constexpr, GATHERED: tl.constexpr, UNIT: tl.constexpr, FULL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, SEGMENTS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr,
    SEGMENT: tl.constexpr, COUNT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Stages FIRST to LAST - 1 for BLOCK_ROWS rows, SEGMENTS segments at a time.

    Stage i leaves the segments' results of reduction i in `partials[i]`, [R, segments]; the last stage stores the outputs.
    Earlier reductions are read from `finished`, [R, count], which is `partials` unless `combine` came between. A launch of
    all stages has one program for a row; several programs share a row where each stage is a launch.
    """
    N = N.to(INDEX) * UNIT
    row = _rows(tl.program_id(0) // blocks_per_row, BLOCK_ROWS)
    source = tl.minimum(row, R - 1)
    part = tl.program_id(0) % blocks_per_row
    steps = _cdiv(segments, SEGMENTS)
    first, end = part * steps // blocks_per_row, (part + 1) * steps // blocks_per_row
    pointers = _row_pointers(elements, strides, source, UNIT)
    targets = _row_pointers(outputs, output_strides, row, UNIT)
    row_values = _row_values(source, pointers, rows, ids, scalars, integers, N, GATHERED)
    for stage in tl.static_range(FIRST, LAST):
        reduced = ()
        for i in tl.static_range(stage):
            reduced = reduced + (_finished(kind_of(FORMULAS, i), finished[i], source, count, COUNT),)
        for index in range(first, end):
            # Every second stage goes backwards: what was read last is still in the L2 cache, if outputs do not take its place.
            step = first + end - 1 - index if stage % 2 else index
            segment = step * SEGMENTS + tl.arange(0, SEGMENTS)[None, :, None]
            base = segment.to(INDEX) * SEGMENT
            tiles = _load(
                pointers, base, N, BLOCK_ROWS, CHUNKS, LANES, PIECE, FULL,
                "evict_first" if stage >= last_reading_stage(FORMULAS) else "evict_last",
            )  # fmt: skip
            if stage < reduction_count(FORMULAS):
                results, _ = _segment_results(
                    FORMULAS, stage, tiles, columns, row_values, reduced, base, N, BLOCK_ROWS, CHUNKS, LANES, PIECE, FULL,
                    False,
                )  # fmt: skip
                for i in tl.static_range(len(results)):
                    inside = _per_row(row < R) & (segment < segments)
                    tl.store(partials[stage][i] + _per_row(row) * segments + segment, results[i], mask=inside)
            else:
                of_segments = ()
                for i in tl.static_range(stage):
                    if reads_terms(FORMULAS, i):
                        at = partials[i][0] + _per_row(source) * segments + segment
                        maxima = tl.load(at, mask=segment < segments, other=0.0)
                        of_segments = of_segments + ((_weights(maxima, reduced[i][0]), maxima, ()),)
                    else:
                        of_segments = of_segments + ((),)
                _store_outputs(
                    FORMULAS, targets, tiles, columns, row_values, reduced, of_segments, base, row, R, N, BLOCK_ROWS, CHUNKS,
                    LANES, PIECE, FULL, False, "evict_first",
                )  # fmt: skip
        if stage < LAST - 1:
            tl.debug_barrier()
        if stage == reduction_count(FORMULAS):
            if part == 0:
                _store_row_outputs(FORMULAS, row_outputs, row_values, reduced, row, R, BLOCK_ROWS)


@triton.jit(do_not_specialize=["count", "groups"], do_not_specialize_on_alignment=["source", "target"])
def combine(source, target, count, groups, KIND: tl.constexpr, GROUP: tl.constexpr):
    """The results of `count` segments a row, [R, count], as those of `groups` aligned groups of GROUP: subtrees of the tree.

    Sums of exponentials become relative to the row's maximum, which `rescaled` then leaves as they are.
    """
    row = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    index = group * GROUP + tl.arange(0, GROUP)[None, None, :]
    results = ()
    for i in tl.static_range(len(source)):
        fill = 0.0 if i == 1 else _fill(KIND)
        results = results + (tl.load(source[i] + row * count + index, mask=index < count, other=fill),)
    if KIND == "sum_exp":
        maximum = tl.full([1, 1, GROUP], _fill(KIND), tl.float32)
        for start in range(0, count, GROUP):
            other = start + tl.arange(0, GROUP)[None, None, :]
            maximum = larger(maximum, tl.load(source[0] + row * count + other, mask=other < count, other=_fill(KIND)))
        maximum = _extreme(maximum, KIND)
        results = (maximum, _tree(rescaled(results[0], results[1], maximum)))
    combined = _row_result(KIND, results)
    for i in tl.static_range(len(source)):
        tl.store(target[i] + row * groups + group, combined[i])


@triton.jit(do_not_specialize=["integers"])
def pointwise(elements, scalars, integers, outputs, TOTAL, FORMULAS: tl.constexpr, BLOCK: tl.constexpr, REPEAT: tl.constexpr):
    """REPEAT blocks of BLOCK consecutive elements; every element is loaded before one is stored."""
    offsets, tiles = (), ()
    for i in tl.static_range(REPEAT):
        offset = tl.program_id(0).to(tl.int64) * (BLOCK * REPEAT) + i * BLOCK + tl.arange(0, BLOCK)
        tile = ()
        for j in tl.static_range(len(elements)):
            tile = tile + (tl.load(elements[j] + offset, mask=offset < TOTAL).to(tl.float32),)
        offsets, tiles = offsets + (offset,), tiles + (tile,)
    for i in tl.static_range(REPEAT):
        for j in tl.static_range(len(outputs)):
            value = evaluate(FORMULAS, "outputs", j, tiles[i], scalars + integers, (), offsets[i], (BLOCK,))
            _store(outputs[j] + offsets[i], value, offsets[i] < TOTAL, "")


@triton.jit
def _column_tree(x):
    """[L, B] to [1, B]: the tree over the first axis."""
    for _level in tl.static_range(_log2(x.shape[0])):
        x = tl.reduce(tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), 1, _add)
    return x


@triton.jit(do_not_specialize=["strides", "R", "N", "groups"], do_not_specialize_on_alignment=["targets"])
def column_sums(
    elements, strides, columns, rows, scalars, targets, R, N, groups,
    FORMULAS: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr,
    SEGMENT: tl.constexpr, GROUP: tl.constexpr, STRIP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums over GROUP lanes of one segment for BLOCK_N columns: row `segment * groups + group` of `targets`, [*, N].

    The lanes of a group lie in STRIP tiles, neighbours in different ones, so the tree's first levels add tiles.
    """
    N = N * UNIT
    blocks_n = _cdiv(N, BLOCK_N)
    column = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    target = tl.program_id(0) // blocks_n
    first = (target // groups).to(tl.int64) * SEGMENT + target % groups * GROUP
    shared = ()
    for i in tl.static_range(len(columns)):
        shared = shared + (tl.load(columns[i] + column, mask=column < N, other=0.0).to(tl.float32),)
    sums = ()
    for _strip in tl.static_range(STRIP * len(targets)):
        sums = sums + (tl.full([GROUP // STRIP, BLOCK_N], 0.0, tl.float32),)
    for chunk in range(CHUNKS):
        added = ()
        for strip in tl.static_range(STRIP):
            rows_1d = first + (chunk * LANES + strip) + tl.arange(0, GROUP // STRIP) * STRIP
            row = rows_1d[:, None]
            inside = (row < R) & (column < N)
            tile, row_values = (), ()
            for i in tl.static_range(len(elements)):
                pointer = elements[i] + row * strides[i] * UNIT + column
                value = tl.load(pointer) if EVEN else tl.load(pointer, mask=inside, other=0.0)
                tile = tile + (value.to(tl.float32),)
            for i in tl.static_range(len(rows)):
                row_values = row_values + (tl.load(rows[i] + rows_1d, mask=rows_1d < R, other=0.0)[:, None],)
            for i in tl.static_range(len(targets)):
                value = evaluate(
                    FORMULAS, "sums", i, tile + shared, row_values + scalars, (), column, (GROUP // STRIP, BLOCK_N)
                )
                if not EVEN:
                    value = tl.where(inside, value, 0.0)
                added = added + (sums[strip * len(targets) + i] + value,)
        sums = added
    for i in tl.static_range(len(targets)):
        total = _column_tree(_tree_of(sums[i :: len(targets)]))
        _store(targets[i] + target.to(tl.int64) * N + column, canonical(total), column < N, "")


@triton.jit(do_not_specialize=["count", "N"], do_not_specialize_on_alignment=["sources", "targets"])
def column_tree(sources, targets, count, N, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Each aligned group of GROUP rows of `sources`, [count, N], summed by the tree: a row of `targets`."""
    blocks_n = _cdiv(N, BLOCK_N)
    column = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    group = tl.program_id(0) // blocks_n
    row = group * GROUP + tl.arange(0, GROUP)[:, None]
    for i in tl.static_range(len(sources)):
        inside = (row < count) & (column < N)
        values = tl.load(sources[i] + row.to(tl.int64) * N + column, mask=inside, other=0.0)
        _store(targets[i] + group.to(tl.int64) * N + column, canonical(_column_tree(values)), column < N, "")
