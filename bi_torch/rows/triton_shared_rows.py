"""Rows of many segments that are read once: a Triton kernel whose programs wait for each other.

A program takes one segment of a row and keeps it in registers. It leaves its segment's result in memory, waits until every
program of the row has done so, reads all of them and evaluates the contract's tree over segments; so do the others. Then it
goes on to the next reduction or to the outputs. Where there are none, only the row's last program waits. Which program takes
which segment cannot matter to the bits.

Programs take their work from a ticket counter, in the order in which they start. A program that waits therefore waits for
programs that run, or that will run as soon as one of an earlier row ends; those of earlier rows all run and wait for nobody
else. So the kernel ends if as many programs as a row has segments fit on the GPU at a time.
"""

import triton
import triton.language as tl

from bi_torch.rows.triton_arithmetic import kind_of, reads_terms, reduction_count
from bi_torch.rows.triton_kernels import (
    _fill,
    _load,
    _row_pointers,
    _row_result,
    _row_values,
    _segment_results,
    _store_outputs,
    _store_row_outputs,
    _weights,
)


@triton.jit
def _post(words, value):
    """Leave a float32 in the low half of a word, beside a mark in the high half.

    Words are written and read as a whole, and nothing else is handed on: no fence is needed.
    """
    bits = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.atomic_xchg(words, bits | (1 << 32), sem="relaxed")


@triton.jit
def _await(words, inside):
    """Those of `words` that are `inside`, once all are there: zeros say that one is not. Volatile loads miss the L1 cache."""
    found = tl.load(words, mask=inside, other=1 << 32, volatile=True)
    while tl.min((found >> 32).to(tl.int32)) == 0:
        found = tl.load(words, mask=inside, other=1 << 32, volatile=True)
    return found


@triton.jit
def _gathered(KIND: tl.constexpr, words, row, first, R, segments, NUMBERS: tl.constexpr, COUNT: tl.constexpr):
    """A row's result from the NUMBERS that each of its segments posts, numbered from `first` among all of its numbers."""
    index = tl.arange(0, COUNT)[None, None, :]
    inside = index < segments
    results = ()
    for j in tl.static_range(NUMBERS):
        value = _await(words + ((first + j) * R + row) * segments + index, inside).to(tl.int32).to(tl.float32, bitcast=True)
        results = results + (tl.where(inside, value, 0.0 if j == 1 else _fill(KIND)),)
    return _row_result(KIND, results)


@triton.jit
def _segment(
    row, number, elements, strides, columns, rows, ids, scalars, integers, outputs, output_strides, row_outputs, words,
    R, N, segments,
    FORMULAS: tl.constexpr, GATHERED: tl.constexpr, UNIT: tl.constexpr, FULL: tl.constexpr,
    CHUNKS: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr, SEGMENT: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Segment `number` of a row in `rows_shared`."""
    segment = number + tl.arange(0, 1)[None, :, None]
    base = segment * SEGMENT
    pointers = _row_pointers(elements, strides, row, UNIT)
    tiles = _load(pointers, base, N, 1, CHUNKS, LANES, PIECE, FULL, "evict_first")
    row_values = _row_values(row, pointers, rows, ids, scalars, integers, N, GATHERED)
    reduced, of_segments, first = (), (), 0
    for i in tl.static_range(reduction_count(FORMULAS)):
        results, terms = _segment_results(
            FORMULAS, i, tiles, columns, row_values, reduced, base, N, 1, CHUNKS, LANES, PIECE, FULL, True
        )
        for j in tl.static_range(len(results)):
            _post(words + ((first + j) * R + row) * segments + segment, results[j])
        if len(outputs) or i < reduction_count(FORMULAS) - 1:
            reduced = reduced + (_gathered(kind_of(FORMULAS, i), words, row, first, R, segments, len(results), COUNT),)
            first += len(results)
            weights = _weights(results[0], reduced[i][0]) if reads_terms(FORMULAS, i) else 1.0
            of_segments = of_segments + ((weights, results[0], terms),)
        elif number == segments - 1:
            complete = reduced + (_gathered(kind_of(FORMULAS, i), words, row, first, R, segments, len(results), COUNT),)
            _store_row_outputs(FORMULAS, row_outputs, row_values, complete, row, R, 1)
    if len(outputs):
        targets = _row_pointers(outputs, output_strides, row, UNIT)
        _store_outputs(
            FORMULAS, targets, tiles, columns, row_values, reduced, of_segments, base, row, R, N, 1, CHUNKS, LANES, PIECE, FULL,
            True, "evict_first",
        )  # fmt: skip
        if number == 0:
            _store_row_outputs(FORMULAS, row_outputs, row_values, reduced, row, R, 1)


@triton.jit(
    do_not_specialize=["strides", "output_strides", "integers", "R", "N", "segments"],
    do_not_specialize_on_alignment=["words"],
)
def rows_shared(
    elements, strides, columns, rows, ids, scalars, integers, outputs, output_strides, row_outputs, words,
    R, N, segments,
    FORMULAS: tl.constexpr, GATHERED: tl.constexpr, UNIT: tl.constexpr, FULL: tl.constexpr,
    CHUNKS: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr, SEGMENT: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """One segment of one row, from loads to stores in registers.

    `words` are int64 zeros: the ticket, then for every number of a segment's results [R, segments]. COUNT is a power of two
    that holds `segments`. Where masks are needed, the last segment alone does.
    """
    N = N * UNIT
    ticket = tl.atomic_add(words, 1, sem="relaxed").to(tl.int32)
    words += 1
    row, number = (ticket // segments).to(tl.int64), ticket % segments
    if FULL < CHUNKS:
        if number < segments - 1:
            _segment(
                row, number, elements, strides, columns, rows, ids, scalars, integers, outputs, output_strides, row_outputs,
                words, R, N, segments, FORMULAS, GATHERED, UNIT, CHUNKS, CHUNKS, LANES, PIECE, SEGMENT, COUNT,
            )  # fmt: skip
        else:
            _segment(
                row, number, elements, strides, columns, rows, ids, scalars, integers, outputs, output_strides, row_outputs,
                words, R, N, segments, FORMULAS, GATHERED, UNIT, FULL, CHUNKS, LANES, PIECE, SEGMENT, COUNT,
            )  # fmt: skip
    else:
        _segment(
            row, number, elements, strides, columns, rows, ids, scalars, integers, outputs, output_strides, row_outputs,
            words, R, N, segments, FORMULAS, GATHERED, UNIT, CHUNKS, CHUNKS, LANES, PIECE, SEGMENT, COUNT,
        )  # fmt: skip
