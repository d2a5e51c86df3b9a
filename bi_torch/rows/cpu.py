"""Row and column programs on CPU tensors, in torch operations alone.

Every operation of a formula is one torch operation, or a few, on a tile of rows; `cpu_arithmetic` says why each is exact. The
order of additions is the row contract's, written out in slices; torch's own sums take no part. So the bits depend neither
on threads nor on vector width, and a caller's flush-denormal mode is suspended for the call.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace

import torch
from torch import Tensor

from bi_torch.rows.cpu_arithmetic import F32, I32, TorchArithmetic, encode
from shared_specs import sum_exp
from shared_specs.rows import ROW_CONTRACT, ColumnProgram, Reduction, RowContract, RowProgram
from shared_specs.trace import terms_read

SERIAL = 1 << 15
"""Elements up to which torch runs an operation on the calling thread alone; also what fits the cache."""

COLUMNS = 32  # columns that a sum over rows works on at a time, on each thread

_F = TorchArithmetic()
_INT_RANGE = torch.iinfo(torch.int32)


@torch.no_grad()
def run_rows(
    program: RowProgram,
    inputs: Mapping[str, Tensor],
    scalars: Mapping[str, float | int],
    out_dtypes: Mapping[str, torch.dtype],
    *,
    outs: Mapping[str, Tensor] | None = None,
    contract: RowContract = ROW_CONTRACT,
) -> dict[str, Tensor]:
    """Every output of `program`, rounded once to its dtype.

    Args:
        program: what is computed.
        inputs: [R, N] of bfloat16, float16 or float32 for an element, [N] for a column, float32 [R] for a row, int32 or int64
            [R] for an id.
        scalars: the call's scalars, rounded to float32, and integers.
        out_dtypes: of every output [R, N]; outputs [R] are float32 where it names none.
        outs: tensors to write instead of new ones; an output may be one of the inputs.
        contract: the order of additions.
    """
    rows, n = inputs[program.elements[0]].shape
    results = dict(outs or {})
    for names, shape in ((program.outputs, (rows, n)), (program.row_outputs, (rows,))):
        for name in names:
            if name not in results:
                results[name] = torch.empty(shape, dtype=out_dtypes.get(name, F32), device="cpu")
    with subnormals_kept(rows * n) as tile:
        constants = _constants(program, scalars)
        step = max(1, tile // max(1, n))
        for lo in range(0, rows, step):
            block = slice(lo, min(lo + step, rows))
            part = {name: x if name in program.columns else x[block] for name, x in inputs.items()}
            _run_block(program, part, constants, {name: x[block] for name, x in results.items()}, tile, contract)
    return results


def _run_block(
    program: RowProgram,
    inputs: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    results: Mapping[str, Tensor],
    tile: int,
    contract: RowContract,
) -> None:
    """The program on whole rows; formulas are evaluated on as many columns as fit a tile."""
    rows, n = inputs[program.elements[0]].shape
    width = n if rows * n <= tile else max(1, tile // (rows * contract.segment)) * contract.segment
    parts = [slice(lo, min(lo + width, n)) for lo in range(0, n, width)] if n else [slice(0, 0)]
    common = SimpleNamespace(**constants, count=torch.tensor(n, dtype=F32, device="cpu"))
    for name in program.rows:
        setattr(common, name, inputs[name][:, None])
    for name in program.ids:
        # An id beyond int32 is outside every row and stays so.
        setattr(common, name, inputs[name].clamp(_INT_RANGE.min, _INT_RANGE.max).to(I32)[:, None])
    for name, (element, index) in program.gathered.items():
        setattr(common, name, _gather(inputs[element], inputs[index]))

    def cells(part: slice) -> SimpleNamespace:
        """What formulas read on the columns of `part`."""
        e = SimpleNamespace(**vars(common))
        for name in program.elements:
            setattr(e, name, inputs[name][:, part].to(F32))
        for name in program.columns:
            setattr(e, name, inputs[name][None, part].to(F32))
        e.column = torch.arange(part.start, part.stop, dtype=I32, device="cpu")[None]
        return e

    def values(of: Callable[..., Tensor], e: SimpleNamespace) -> Tensor:
        """A formula as float32 [rows, columns]."""
        return of(_F, e).expand(rows, e.column.shape[1])

    maxima = {}
    for reduction in program.reductions:
        blocks = (values(reduction.of, cells(part)) for part in parts)
        if reduction.kind == "sum_exp":
            segments = _segment_sum_exps(blocks, contract)
            maxima[reduction.name] = segments.max
            setattr(common, reduction.name, _row_sum_exp(segments))
        else:
            setattr(common, reduction.name, _reduce(reduction, blocks, contract))
    for part in parts:
        e = cells(part)
        for reduction in terms_read(program):
            setattr(e, reduction.name, _with_terms(reduction, e, maxima[reduction.name], contract))
        # All are computed before one is written: an output may be an input.
        computed = {name: encode(values(of, e), results[name].dtype) for name, of in program.outputs.items()}
        for name, value in computed.items():
            results[name][:, part] = value
    for name, of in program.row_outputs.items():
        results[name].copy_(encode(of(_F, common).expand(rows, 1)[:, 0], results[name].dtype))


@torch.no_grad()
def run_columns(
    program: ColumnProgram,
    inputs: Mapping[str, Tensor],
    scalars: Mapping[str, float | int],
    out_dtypes: Mapping[str, torch.dtype],
    *,
    contract: RowContract = ROW_CONTRACT,
) -> dict[str, Tensor]:
    """The sums of `program` over the rows, [N] each; arguments as for `run_rows`."""
    rows, n = inputs[program.elements[0]].shape
    results = {name: torch.empty(n, dtype=out_dtypes.get(name, F32), device="cpu") for name in program.sums}
    with subnormals_kept(rows * n) as tile:
        constants = _constants(program, scalars)
        step = COLUMNS * max(1, tile // SERIAL)
        for lo in range(0, n, step):
            part = slice(lo, min(lo + step, n))

            def chunk(of: Callable[..., Tensor], block: slice, part: slice = part) -> Tensor:
                """A formula on the rows of `block` and the columns of `part`, as float32."""
                e = SimpleNamespace(**constants)
                for name in program.elements:
                    setattr(e, name, inputs[name][block, part].to(F32))
                for name in program.columns:
                    setattr(e, name, inputs[name][None, part].to(F32))
                for name in program.rows:
                    setattr(e, name, inputs[name][block, None])
                return of(_F, e).expand(block.stop - block.start, part.stop - part.start)

            for name, of in program.sums.items():
                total = _column_total(partial(chunk, of), rows, part.stop - part.start, contract)
                results[name][part] = encode(total, results[name].dtype)
    return results


def _constants(program: RowProgram | ColumnProgram, scalars: Mapping[str, float | int]) -> dict[str, Tensor]:
    integers = program.integers if isinstance(program, RowProgram) else ()
    constants = {name: torch.tensor(scalars[name], dtype=F32, device="cpu") for name in program.scalars}
    return constants | {name: torch.tensor(scalars[name], dtype=I32, device="cpu") for name in integers}


def _gather(x: Tensor, ids: Tensor) -> Tensor:
    """[R, 1]: the element of each row at its id, NaN outside the row."""
    n = x.shape[1]
    inside = (ids >= 0) & (ids < n)
    if not n:
        return torch.full((len(x), 1), torch.nan, dtype=F32, device="cpu")
    chosen = x.gather(1, torch.where(inside, ids, 0).to(torch.int64)[:, None]).to(F32)
    return torch.where(inside[:, None], chosen, torch.nan)


def _reduce(reduction: Reduction, blocks: Iterator[Tensor], contract: RowContract) -> Tensor:
    """The sum, maximum or minimum of a row that comes in blocks [R, n] of whole segments, as [R, 1]."""
    if reduction.kind in ("max", "min"):
        largest = reduction.kind == "max"
        return _extreme(torch.cat([_extreme(x, largest) for x in blocks], 1), largest)
    return _row_total(torch.cat([_lanes_total(part, contract) for x in blocks for part in _segments(x, contract)], 1))


def _segment_sum_exps(blocks: Iterator[Tensor], contract: RowContract) -> sum_exp.SumExp:
    """The maxima and the sums of a row's segments, [R, segments]."""
    maxima, sums = [], []
    for part in (part for x in blocks for part in _segments(x, contract)):
        maxima.append(_extreme(part, largest=True))
        sums.append(_lanes_total(sum_exp.term(_F, part, maxima[-1]), contract))
    return sum_exp.SumExp(torch.cat(maxima, 1)[:, :, 0], torch.cat(sums, 1))


def _row_sum_exp(segments: sum_exp.SumExp) -> sum_exp.SumExp:
    """Those of the row, [R, 1]."""
    row_max = _extreme(segments.max, largest=True)
    return sum_exp.SumExp(row_max, _row_total(sum_exp.rescaled(_F, segments, row_max)))


def _with_terms(reduction: Reduction, e: SimpleNamespace, maxima: Tensor, contract: RowContract) -> sum_exp.SumExp:
    """A sum of exponentials with the term and the weight of every element; `maxima` are its segments', [R, segments]."""
    row = getattr(e, reduction.name)
    weights = sum_exp.weight(_F, maxima, row.max)
    if maxima.shape[1] > 1:
        segment = e.column[0] // contract.segment
        maxima, weights = maxima[:, segment], weights[:, segment]
    return row._replace(term=sum_exp.term(_F, reduction.of(_F, e), maxima), weight=weights)


def _segments(x: Tensor, contract: RowContract) -> Iterator[Tensor]:
    """[R, segments, elements]: those that are full, then the last one where it is not."""
    n = x.shape[1]
    full, rest = divmod(n, contract.segment)
    if full:
        yield x[:, : n - rest].unflatten(1, (full, contract.segment))
    if rest or not n:
        yield x[:, None, n - rest :]


def _lanes_total(x: Tensor, contract: RowContract) -> Tensor:
    """The sums of segments [R, segments, elements], as [R, segments]."""
    rows, segments, n = x.shape
    sums = torch.zeros(rows, segments, contract.lanes_for(n), dtype=F32, device="cpu")
    for chunk in x.split(contract.lanes, 2):
        sums[:, :, : chunk.shape[2]] += chunk
    return _tree(sums.movedim(2, 0))


def _row_total(segments: Tensor) -> Tensor:
    """[R, segments] to [R, 1]."""
    return _tree(segments.T)[:, None]


def _column_total(chunk: Callable[[slice], Tensor], rows: int, width: int, contract: RowContract) -> Tensor:
    """The sums [width] over the rows; `chunk` gives what is summed for some of them, [rows, width]."""
    lanes, totals = contract.lanes_for(rows), []
    for first in range(0, max(1, rows), contract.segment):
        end = min(first + contract.segment, rows)
        sums = torch.zeros(lanes, width, dtype=F32, device="cpu")
        for lo in range(first, end, lanes):
            values = chunk(slice(lo, min(lo + lanes, end)))
            sums[: len(values)] += values
        totals.append(_tree(sums))
    return _tree(torch.stack(totals))


def _tree(x: Tensor) -> Tensor:
    """The sum over the first dimension by adjacent pairs, filled up with +0 to a power of two."""
    while len(x) > 1:
        # An odd one is added to +0: itself, as no sum of the contract is -0.
        pairs = x[: len(x) - 1 : 2] + x[1::2]
        x = torch.cat([pairs, x[-1:]]) if len(x) % 2 else pairs
    return x[0]


def _extreme(x: Tensor, largest: bool) -> Tensor:
    """The largest or the smallest of the last dimension, kept: NaN wins, +0 is above -0, an infinity if there is none."""
    if not x.shape[-1]:
        return torch.full((*x.shape[:-1], 1), -torch.inf if largest else torch.inf, dtype=F32, device="cpu")
    extreme = x.amax(-1, keepdim=True) if largest else x.amin(-1, keepdim=True)
    zero = extreme == 0
    if not zero.any():
        return extreme
    # Where the largest is zero, a positive sign is that of a +0; where the smallest is zero, a negative one that of a -0.
    negative = x.signbit().all(-1, keepdim=True) if largest else x.signbit().any(-1, keepdim=True)
    return _F.select(zero, _F.select(negative, -0.0, 0.0), extreme)


@contextmanager
def subnormals_kept(elements: int) -> Iterator[int]:
    """Suspends torch's flush-denormal mode; gives the number of elements to work on at a time.

    The mode belongs to each thread, and torch's workers inherit it where they are created. It can be ended on the calling
    thread only, so where it is found, tiles are made too small for the workers.
    """
    threads = 1 if elements <= SERIAL else torch.get_num_threads()
    flushed = _flushed(threads)
    if not any(flushed):
        yield SERIAL * threads
        return
    torch.set_flush_denormal(False)
    try:
        yield SERIAL
    finally:
        torch.set_flush_denormal(flushed[0])


def _flushed(threads: int) -> list[bool]:
    """Whether a subnormal result is flushed: on this thread, and on any of the others."""
    here = _probe(1) * 0.5
    found = [not here.view(I32).any()]
    if threads > 1:
        halves = _probe(SERIAL * threads) * 0.5
        found.append(not halves[::SPACING].view(I32).all())
    return found


SPACING = 1024


@cache
def _probe(size: int) -> Tensor:
    """Smallest normal numbers, far between: computing with subnormals is slow."""
    x = torch.zeros(size, dtype=F32, device="cpu")
    x[::SPACING] = torch.finfo(F32).tiny
    return x
