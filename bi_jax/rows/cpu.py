"""Row and column programs in jax.numpy, for computations lowered for a CPU.

Inputs become integers before anything moves them, float64 values where they are used (`bi_jax.float64`), and integers again
before they are stored, so the bits are the contract's in any surrounding program. Work proceeds in blocks that the cache
holds: of whole rows, and of whole segments in parts of a row that is longer. What a block computes does not depend on its
bounds, so the last block of rows overlaps the one before it.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bi_jax.float64 import decode, encode, round_to, storage_bits
from bi_jax.rows.cpu_arithmetic import CpuArithmetic
from shared_specs import sum_exp
from shared_specs.formats import FLOAT32, FloatFormat, float_format
from shared_specs.rows import ROW_CONTRACT, ColumnProgram, Formula, Reduction, RowContract, RowProgram
from shared_specs.trace import terms_read

BLOCK = 1 << 16  # elements worked on at a time: their float64 values stay in the cache
BLOCK_COLUMNS = 64  # columns summed at a time

Arrays = dict[str, jax.Array]

_F = CpuArithmetic()


def run_rows(
    program: RowProgram,
    inputs: Mapping[str, jax.Array],
    scalars: Mapping[str, Any],
    out_dtypes: Mapping[str, Any],
    contract: RowContract = ROW_CONTRACT,
) -> Arrays:
    """Every output of `program`.

    Args:
        program: what is computed.
        inputs: elements [R, N] and columns [N] of a 16-bit float dtype or float32, rows float32 [R], ids int32 [R].
        scalars: float32 and int32 numbers or arrays of no dimension.
        out_dtypes: dtype of each output [R, N], which is rounded to it once.
        contract: the order of additions.
    """
    with jax.enable_x64(True):
        rows, n = inputs[program.elements[0]].shape
        formats = {name: float_format(jnp.dtype(out_dtypes[name]).name) for name in program.outputs}
        results = {name: jnp.zeros((rows, n), fmt.storage) for name, fmt in formats.items()}
        results |= {name: jnp.zeros(rows, FLOAT32.storage) for name in program.row_outputs}
        if rows:
            operands = {name: _Patterns.of(x) for name, x in inputs.items() if name not in program.ids}
            ids = {name: inputs[name] for name in program.ids}
            for name, (element, index) in program.gathered.items():
                operands[name] = operands[element].gathered(ids[index])
            fixed = _scalars(program, scalars)
            size = min(rows, max(1, BLOCK // max(n, 1)))

            def step(i: jax.Array, results: Arrays) -> Arrays:
                start = jnp.minimum(i * size, rows - size)
                cut = {name: x if name in program.columns else x.part(start, size) for name, x in operands.items()}
                block = _Block(program, cut, n, contract)
                for name in (*program.rows, *program.gathered):
                    setattr(block.e, name, cut[name].values()[:, None])
                for name, x in ids.items():
                    setattr(block.e, name, lax.dynamic_slice_in_dim(x, start, size)[:, None])
                vars(block.e).update(fixed)
                for name, x in block.run(formats).items():
                    results[name] = lax.dynamic_update_slice_in_dim(results[name], x, start, axis=0)
                return results

            results = lax.fori_loop(0, -(-rows // size), step, results)
        dtypes = {name: out_dtypes.get(name, jnp.float32) for name in results}
        return {name: lax.bitcast_convert_type(x, dtypes[name]) for name, x in results.items()}


def run_columns(
    program: ColumnProgram,
    inputs: Mapping[str, jax.Array],
    scalars: Mapping[str, Any],
    out_dtypes: Mapping[str, Any],
    contract: RowContract = ROW_CONTRACT,
) -> Arrays:
    """The sums of `program`, [N] each; arguments as for `run_rows`."""
    with jax.enable_x64(True):
        rows, n = inputs[program.elements[0]].shape
        formats = {name: float_format(jnp.dtype(out_dtypes[name]).name) for name in program.sums}
        results = {name: jnp.zeros(n, fmt.storage) for name, fmt in formats.items()}
        if rows and n:
            lanes = contract.lanes_for(rows)
            chunks, per_segment = -(-rows // lanes), contract.segment // lanes
            operands = {name: _Patterns.of(x) for name, x in inputs.items()}
            operands |= {name: operands[name].padded(0, chunks * lanes) for name in (*program.elements, *program.rows)}
            fixed = _scalars(program, scalars)
            size = min(n, BLOCK_COLUMNS)

            def block(i: jax.Array, results: Arrays) -> Arrays:
                start = jnp.minimum(i * size, n - size)
                cut = {name: operands[name].part(start, size, axis=1) for name in program.elements}
                columns = {name: operands[name].part(start, size).values() for name in program.columns}

                def chunk(j: jax.Array, sums: Arrays) -> Arrays:
                    e = SimpleNamespace(**fixed, **columns)
                    for name, x in cut.items():
                        setattr(e, name, x.part(j * lanes, lanes).values())
                    for name in program.rows:
                        setattr(e, name, operands[name].part(j * lanes, lanes).values()[:, None])
                    inside = (j * lanes + jnp.arange(lanes) < rows)[:, None]
                    return {name: _F.add(sums[name], jnp.where(inside, of(_F, e), 0.0)) for name, of in program.sums.items()}

                def segment(s: jax.Array) -> Arrays:
                    zeros = {name: _start((lanes, size)) for name in program.sums}
                    stop = jnp.minimum((s + 1) * per_segment, chunks)
                    sums = lax.fori_loop(s * per_segment, stop, chunk, zeros)
                    return {name: _tree(x, axis=0) for name, x in sums.items()}

                sums = lax.map(segment, jnp.arange(contract.segments(rows)))
                for name, x in sums.items():
                    pattern = encode(round_to(_tree(x, axis=0), formats[name]), formats[name])
                    results[name] = lax.dynamic_update_slice_in_dim(results[name], pattern, start, axis=0)
                return results

            results = lax.fori_loop(0, -(-n // size), block, results)
        return {name: lax.bitcast_convert_type(x, out_dtypes[name]) for name, x in results.items()}


class _Block:
    """A row program on a few rows, which are cut into parts where they are long. `e` is what its formulas read."""

    def __init__(self, program: RowProgram, operands: Mapping[str, "_Patterns"], n: int, contract: RowContract) -> None:
        self.program, self.n, self.contract = program, n, contract
        self.e = SimpleNamespace(count=np.float64(np.float32(n)))
        self.rows = operands[program.elements[0]].bits.shape[0]
        self.width = n if n <= BLOCK else max(BLOCK // contract.segment, 1) * contract.segment
        self.parts = -(-n // self.width) if n else 1
        whole = self.width * self.parts
        self.elements = {name: operands[name].padded(1, whole) for name in program.elements}
        self.columns = {name: operands[name].padded(0, whole) for name in program.columns}
        self.maxima: Arrays = {}  # those of the segments, for each sum of exponentials

    def run(self, formats: Mapping[str, FloatFormat]) -> Arrays:
        """The patterns of every output."""
        for reduction in self.program.reductions:
            setattr(self.e, reduction.name, self._reduction(reduction))
        results = {}
        if self.program.outputs:
            parts = self._each_part(lambda j: self._patterns(formats, j))
            # There are several parts of one row, or one part of several rows.
            results = {name: x.reshape(self.rows, -1)[:, : self.n] for name, x in parts.items()}
        for name, of in self.program.row_outputs.items():
            results[name] = encode(jnp.broadcast_to(of(_F, self.e), (self.rows, 1))[:, 0], FLOAT32)
        return results

    def _reduction(self, reduction: Reduction) -> jax.Array | sum_exp.SumExp:
        """The result for each row, [rows, 1]."""
        if reduction.kind == "sum":
            sums = self._each_part(lambda j: _segment_sums(self._values(reduction.of, j, 0.0), self.contract))
            return _tree(sums.reshape(self.rows, -1), axis=1)[:, None]
        if reduction.kind == "sum_exp":
            return self._sum_exp(reduction)
        fold, fill = (_max, -np.inf) if reduction.kind == "max" else (_min, np.inf)
        return fold(self._each_part(lambda j: fold(self._values(reduction.of, j, fill))).reshape(self.rows, -1))[:, None]

    def _sum_exp(self, reduction: Reduction) -> sum_exp.SumExp:
        def part(j: jax.Array | int) -> tuple[jax.Array, jax.Array]:
            values = _split(self._values(reduction.of, j, -np.inf), self.contract.segment, -np.inf)
            maxima = _max(values)
            terms = sum_exp.term(_F, values, maxima[..., None])
            terms = terms.reshape(self.rows, -1)
            return maxima, _segment_sums(terms, self.contract)

        segments = sum_exp.SumExp(*(x.reshape(self.rows, -1) for x in self._each_part(part)))
        self.maxima[reduction.name] = segments.max
        row_max = _max(segments.max)[:, None]
        return sum_exp.SumExp(row_max, _tree(sum_exp.rescaled(_F, segments, row_max), axis=1)[:, None])

    def _each_part(self, f: Callable[[Any], Any]) -> Any:
        return f(0) if self.parts == 1 else lax.map(f, jnp.arange(self.parts))

    def _cells(self, part: Any) -> SimpleNamespace:
        """What formulas read on one part."""
        start = part * self.width
        e = SimpleNamespace(**vars(self.e), column=(start + jnp.arange(self.width)).astype(jnp.int32)[None, :])
        for name, x in self.elements.items():
            setattr(e, name, x.part(start, self.width, axis=1).values())
        for name, x in self.columns.items():
            setattr(e, name, x.part(start, self.width).values()[None, :])
        return e

    def _values(self, of: Formula, part: Any, fill: float) -> jax.Array:
        """A formula's values on one part, [rows, width], `fill` behind the end of the row."""
        e = self._cells(part)
        values = jnp.broadcast_to(of(_F, e), (self.rows, self.width))
        return values if self.parts * self.width == self.n else jnp.where(e.column < self.n, values, fill)

    def _patterns(self, formats: Mapping[str, FloatFormat], part: Any) -> Arrays:
        """The outputs on one part; what lies behind the end of the row is anything."""
        e, results = self._cells(part), {}
        for reduction in terms_read(self.program):
            setattr(e, reduction.name, self._with_terms(reduction, e))
        for name, of in self.program.outputs.items():
            values, fmt = jnp.broadcast_to(of(_F, e), (self.rows, self.width)), formats[name]
            results[name] = encode(values if fmt is FLOAT32 else round_to(values, fmt), fmt)
        return results

    def _with_terms(self, reduction: Reduction, e: SimpleNamespace) -> sum_exp.SumExp:
        """A sum of exponentials with the term and the weight of every element."""
        row, maxima = getattr(e, reduction.name), self.maxima[reduction.name]
        weights = sum_exp.weight(_F, maxima, row.max)
        if maxima.shape[1] > 1:
            segment = e.column[0] // self.contract.segment
            maxima, weights = maxima[:, segment], lax.optimization_barrier(weights)[:, segment]
        return row._replace(term=sum_exp.term(_F, reduction.of(_F, e), maxima), weight=weights)


class _Patterns:
    """An array of patterns and how to read them."""

    def __init__(self, bits: jax.Array, fmt: FloatFormat) -> None:
        self.bits, self.fmt = bits, fmt

    @classmethod
    def of(cls, x: jax.Array) -> "_Patterns":
        return cls(storage_bits(x), float_format(x.dtype.name))

    def values(self) -> jax.Array:
        return decode(self.bits, self.fmt)

    def part(self, start: Any, size: int, axis: int = 0) -> "_Patterns":
        return _Patterns(lax.dynamic_slice_in_dim(self.bits, start, size, axis), self.fmt)

    def padded(self, axis: int, size: int) -> "_Patterns":
        """Filled up with zeros to `size`."""
        return _Patterns(_fill_up(self.bits, axis, size, 0), self.fmt)

    def gathered(self, ids: jax.Array) -> "_Patterns":
        """[R, N] at one id a row, [R]; NaN where the id is outside."""
        n = self.bits.shape[1]
        chosen = jnp.full(ids.shape, self.fmt.nan, self.bits.dtype)
        if n:
            found = jnp.take_along_axis(self.bits, jnp.clip(ids, 0, n - 1)[:, None], axis=1)[:, 0]
            chosen = jnp.where((ids >= 0) & (ids < n), found, chosen)
        return _Patterns(chosen, self.fmt)


def _scalars(program: RowProgram | ColumnProgram, scalars: Mapping[str, Any]) -> dict[str, jax.Array]:
    values = {name: _Patterns.of(jnp.asarray(scalars[name], jnp.float32)).values() for name in program.scalars}
    return values | {name: jnp.asarray(scalars[name], jnp.int32) for name in getattr(program, "integers", ())}


def _fill_up(x: jax.Array, axis: int, size: int, fill: float) -> jax.Array:
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=fill)


def _split(values: jax.Array, size: int, fill: float) -> jax.Array:
    """[rows, w] as [rows, pieces, size], filled up; one piece, only as long as w, where w is shorter."""
    rows, width = values.shape
    pieces = max(-(-width // size), 1)
    size = min(size, width)
    return _fill_up(values, 1, pieces * size, fill).reshape(rows, pieces, size)


def _start(shape: tuple[int, ...]) -> jax.Array:
    """Accumulators of +0, which XLA must not know to be that: it takes x for +0 + x, but -0 is not +0."""
    return lax.optimization_barrier(jnp.zeros(shape))


def _segment_sums(values: jax.Array, contract: RowContract) -> jax.Array:
    """[rows, w] to [rows, segments]."""
    segments = _split(values, contract.segment, 0.0)
    rows, count, width = segments.shape
    lanes = contract.lanes_for(width)
    chunks = max(-(-width // lanes), 1)
    filled = _fill_up(segments, 2, chunks * lanes, 0.0).reshape(rows, count, chunks, lanes)
    sums = lax.fori_loop(
        0,
        chunks,
        lambda i, sums: _F.add(sums, lax.dynamic_index_in_dim(filled, i, axis=2, keepdims=False)),
        _start((rows, count, lanes)),
    )
    return _tree(sums, axis=2)


def _tree(values: jax.Array, axis: int) -> jax.Array:
    """The sum over `axis` by adjacent pairs, filled up with +0 to a power of two."""
    values = _fill_up(values, axis, 1 << (values.shape[axis] - 1).bit_length(), 0.0)
    while values.shape[axis] > 1:
        even, odd = (lax.slice_in_dim(values, i, None, stride=2, axis=axis) for i in (0, 1))
        values = _F.add(even, odd)
    return jnp.squeeze(values, axis)


def _max(values: jax.Array) -> jax.Array:
    """The maximum over the last axis, in any order: integers in the order of the values, NaN last, +0 after -0."""
    keys = _ordered(lax.bitcast_convert_type(jnp.where(jnp.isnan(values), np.nan, values), jnp.int64))
    largest = jnp.max(keys, axis=-1, initial=_ordered(np.float64(-np.inf).view(np.int64)))
    return lax.bitcast_convert_type(_ordered(largest), jnp.float64)


def _min(values: jax.Array) -> jax.Array:
    return _F.neg(_max(_F.neg(values)))


def _ordered(bits: Any) -> Any:
    """Patterns of float64 values to integers in the same order, and back."""
    return bits ^ ((bits >> 63) & ((1 << 63) - 1))
