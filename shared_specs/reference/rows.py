"""Row and column programs in NumPy, in the contract's order of additions, written to be read beside `RowContract`."""

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np

from shared_specs import sum_exp
from shared_specs.reference.arithmetic import NumpyArithmetic
from shared_specs.rows import ROW_CONTRACT, ColumnProgram, Reduction, RowContract, RowProgram

F32 = np.float32
_F = NumpyArithmetic()


def run_rows(
    program: RowProgram,
    inputs: Mapping[str, np.ndarray],
    scalars: Mapping[str, float | int] | None = None,
    contract: RowContract = ROW_CONTRACT,
) -> dict[str, np.ndarray]:
    """Every output of `program`, float32, before the rounding to an output dtype.

    Args:
        program: what is computed.
        inputs: float32 [R, N] for an element, [N] for a column, [R] for a row; int32 [R] for an id.
        scalars: the call's scalars (rounded to float32) and integers.
        contract: the order of additions.
    """
    e = SimpleNamespace(**{name: inputs[name] for name in program.elements})
    rows, n = inputs[program.elements[0]].shape
    for name in program.columns:
        setattr(e, name, inputs[name][None, :])
    for name in (*program.rows, *program.ids):
        setattr(e, name, inputs[name][:, None])
    _set_scalars(e, program, scalars or {})
    for name, (element, index) in program.gathered.items():
        ids = inputs[index].astype(np.int64)
        inside = (ids >= 0) & (ids < n)
        chosen = inputs[element][np.arange(rows), np.where(inside, ids, 0)] if n else np.zeros(rows, F32)
        setattr(e, name, np.where(inside, chosen, F32(np.nan))[:, None])
    e.count, e.column = F32(n), np.arange(n, dtype=np.int32)[None, :]
    for reduction in program.reductions:
        values = np.broadcast_to(np.asarray(reduction.of(_F, e), F32), (rows, n))
        setattr(e, reduction.name, _reduce(reduction, values, contract))
    outputs = {name: np.broadcast_to(np.asarray(of(_F, e), F32), (rows, n)) for name, of in program.outputs.items()}
    for name, of in program.row_outputs.items():
        outputs[name] = np.broadcast_to(np.asarray(of(_F, e), F32), (rows, 1))[:, 0]
    return outputs


def run_columns(
    program: ColumnProgram,
    inputs: Mapping[str, np.ndarray],
    scalars: Mapping[str, float | int] | None = None,
    contract: RowContract = ROW_CONTRACT,
) -> dict[str, np.ndarray]:
    """The sums of `program`, float32 [N] each; arguments as for `run_rows`."""
    e = SimpleNamespace(**{name: inputs[name] for name in program.elements})
    shape = inputs[program.elements[0]].shape
    for name in program.columns:
        setattr(e, name, inputs[name][None, :])
    for name in program.rows:
        setattr(e, name, inputs[name][:, None])
    _set_scalars(e, program, scalars or {})
    sums = {}
    for name, of in program.sums.items():
        values = np.broadcast_to(np.asarray(of(_F, e), F32), shape)
        sums[name] = tree(segment_sums(values.T, contract))
    return sums


def segments(values: np.ndarray, contract: RowContract, fill: float) -> np.ndarray:
    """[R, N] as [R, segments, chunks, lanes], filled up with `fill`."""
    rows, n = values.shape
    count = contract.segments(n)
    filled = np.full((rows, count * contract.segment), fill, F32)
    filled[:, :n] = values
    return filled.reshape(rows, count, contract.segment // contract.lanes, contract.lanes)


def segment_sums(values: np.ndarray, contract: RowContract) -> np.ndarray:
    """[R, N] to [R, segments]: the sum of each segment."""
    chunks = segments(values, contract, 0.0)
    lanes = np.zeros((*chunks.shape[:2], contract.lanes), F32)
    for chunk in range(min(chunks.shape[2], -(-values.shape[1] // contract.lanes))):  # behind the row there are zeros
        lanes = _F.add(lanes, chunks[:, :, chunk])
    return tree(lanes)


def tree(values: np.ndarray) -> np.ndarray:
    """The sum over the last axis, by adjacent pairs, filled up with +0 to a power of two."""
    count = 1 << (values.shape[-1] - 1).bit_length()
    values = np.concatenate([values, np.zeros((*values.shape[:-1], count - values.shape[-1]), F32)], axis=-1)
    while values.shape[-1] > 1:
        values = _F.add(values[..., 0::2], values[..., 1::2])
    return values[..., 0]


def _set_scalars(e: SimpleNamespace, program: RowProgram | ColumnProgram, scalars: Mapping[str, float | int]) -> None:
    for name in program.scalars:
        setattr(e, name, F32(scalars[name]))
    for name in getattr(program, "integers", ()):
        setattr(e, name, np.int32(scalars[name]))


def _reduce(reduction: Reduction, values: np.ndarray, contract: RowContract) -> np.ndarray | sum_exp.SumExp:
    """The reduction of [R, N], as [R, 1]."""
    if reduction.kind == "sum":
        return tree(segment_sums(values, contract))[:, None]
    if reduction.kind == "sum_exp":
        return _sum_exp(values, contract)
    fold, start = (_F.max, -np.inf) if reduction.kind == "max" else (_F.min, np.inf)
    return _extreme(fold, _with_first(values, start))[:, None]


def _sum_exp(values: np.ndarray, contract: RowContract) -> sum_exp.SumExp:
    n = values.shape[1]
    parts = np.split(values, range(contract.segment, n, contract.segment), axis=1)
    maxima = np.stack([_extreme(_F.max, _with_first(part, -np.inf)) for part in parts], axis=1)  # [R, segments]
    terms = np.concatenate([sum_exp.term(_F, part, maxima[:, i, None]) for i, part in enumerate(parts)], axis=1)
    row_max = _extreme(_F.max, maxima)[:, None]
    weights = np.repeat(sum_exp.weight(_F, maxima, row_max), contract.segment, axis=1)[:, :n]
    sums = segment_sums(terms, contract)
    total = tree(sum_exp.rescaled(_F, sum_exp.SumExp(maxima, sums), row_max))[:, None]
    return sum_exp.SumExp(row_max, total, terms, weights)


def _with_first(values: np.ndarray, first: float) -> np.ndarray:
    return np.concatenate([np.full((len(values), 1), first, F32), values], axis=1)


def _extreme(fold, values: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    """max or min over the last axis, which is not empty."""
    while values.shape[-1] > 1:
        if values.shape[-1] % 2:
            values = np.concatenate([values, values[..., -1:]], axis=-1)
        values = fold(values[..., 0::2], values[..., 1::2])
    return values[..., 0]
