"""The engine for NVIDIA GPUs: plans Pallas Mosaic kernels for row and column programs, and runs them."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from bi_jax.rows.mosaic_columns import ColumnPass
from bi_jax.rows.mosaic_columns import kernel as columns_kernel
from bi_jax.rows.mosaic_kernel import SEGMENT, WORDS, Plan, kernel, partial_count
from bi_jax.rows.warpgroup import CHUNK, THREADS, VECTOR
from shared_specs.row_schedule import RowSchedule
from shared_specs.rows import ROW_CONTRACT, ColumnProgram, RowProgram
from shared_specs.trace import is_elementwise

SMS = 132
"""Of an H100."""
REGISTERS, MAX_REGISTERS = 65_536, 256
"""Of an SM, and of a thread."""
MAX_TOGETHER = 32
"""Segments of a row whose warpgroups wait for one another: of 255 registers a thread, 16 SMs hold as many;
and a warp can add up their results."""
MAX_ROW = 2**31 - 1
"""Elements of a row, and rows: what an int32 counts."""
MAX_COLUMNS, MIN_COLUMNS = 256, 32
"""Columns of a block that sums over rows: a warp's, and as many float32 as make 128 bytes."""
MAX_SUMS = 8
"""Lanes of a thread, times sums: each takes 8 registers."""

Arrays = Mapping[str, jax.Array]


def run_rows(
    program: RowProgram,
    inputs: Arrays,
    scalars: Mapping[str, jax.Array | float | int],
    out_dtypes: Mapping[str, Any],
    *,
    schedule: RowSchedule | None = None,
) -> dict[str, jax.Array]:
    """The outputs of `program`, on an H100.

    No input is copied, whatever its shape; rows whose length is no multiple of 16 bytes are read by narrower accesses.

    Args:
        program: what is computed.
        inputs: [R, N] in bfloat16, float16 or float32 for an element, [N] for a column, float32 [R] for a row, int32 [R] for
            an id. No dimension is 0.
        scalars: the call's scalars and integers, arrays without dimensions or numbers.
        out_dtypes: dtypes of the outputs [R, N].
        schedule: `default_schedule` if None.

    Raises:
        ValueError: the schedule is not legal for these rows, or a row or their number exceeds `MAX_ROW`.
    """
    rows, n = inputs[program.elements[0]].shape
    plan = row_plan(program, rows, n, _dtypes(program, inputs), _names(out_dtypes), schedule)
    results = _launch(plan, _operands(program, inputs, scalars), rows, n)
    return {name: value.reshape((rows, n) if name in program.outputs else (rows,)) for name, value in results.items()}


def run_columns(
    program: ColumnProgram,
    inputs: Arrays,
    scalars: Mapping[str, jax.Array | float],
    out_dtypes: Mapping[str, Any],
    *,
    schedule: RowSchedule | None = None,
) -> dict[str, jax.Array]:
    """The sums of `program`, [N] each of its dtype in `out_dtypes`; arguments as for `run_rows`.

    `schedule.block_rows` is the number of lanes that a block sums.
    """
    operands = _operands(program, inputs, scalars)
    passes = column_passes(program, *inputs[program.elements[0]].shape, _dtypes(program, inputs), _names(out_dtypes), schedule)
    for made in passes:
        operands = dict(zip(program.sums, columns_kernel(made, tuple(operands))(*operands.values()), strict=True))
    return operands


def column_passes(
    program: ColumnProgram,
    rows: int,
    n: int,
    dtypes: Mapping[str, str],
    out_dtypes: Mapping[str, str],
    schedule: RowSchedule | None = None,
) -> list[ColumnPass]:
    """The kernels that `schedule` makes of `program` for [rows, n]: one, and more while more than one row of sums is left.

    Raises:
        ValueError: the schedule is not legal.
    """
    if schedule is not None and schedule.warps != 4:
        raise ValueError(f"a block of sums over rows has 4 warps, got {schedule.warps}")
    thread_lanes = max(2, MAX_SUMS // (1 << (len(program.sums) - 1).bit_length()))
    wanted = MAX_COLUMNS if schedule is None else CHUNK * thread_lanes // schedule.block_rows
    columns = max(VECTOR, min(wanted, MAX_COLUMNS, 1 << (n - 1).bit_length()))
    lanes = max(ROW_CONTRACT.lanes_for(rows), thread_lanes * CHUNK // columns)
    passes = [ColumnPass(program, rows, n, _items(dtypes), _items(out_dtypes), SEGMENT, lanes, thread_lanes, columns)]
    while (left := passes[-1].results) > 1:
        lanes = 1 << (left - 1).bit_length()
        columns = max(MIN_COLUMNS, min(MAX_COLUMNS, CHUNK * thread_lanes // lanes))
        lanes = max(lanes, thread_lanes * CHUNK // columns)
        partial = dict.fromkeys(program.sums, "float32")
        sums = _sums_of(tuple(program.sums))
        passes.append(ColumnPass(sums, left, n, _items(partial), _items(out_dtypes), lanes, lanes, thread_lanes, columns))
    return passes


def row_plan(
    program: RowProgram,
    rows: int,
    n: int,
    dtypes: Mapping[str, str],
    out_dtypes: Mapping[str, str],
    schedule: RowSchedule | None = None,
) -> Plan:
    """The kernels that `schedule` makes of `program` for [rows, n], with inputs of `dtypes`.

    Raises:
        ValueError: the schedule is not legal for these rows, or a row or their number exceeds `MAX_ROW`.
    """
    if max(rows, n) > MAX_ROW:
        raise ValueError(f"a row, and their number, must not exceed {MAX_ROW}, got {rows} rows of {n}")
    named, count, tail = (_items(dtypes), _items(out_dtypes)), n, 0
    if is_elementwise(program):
        rows, tail = divmod(rows * n, CHUNK)
        n = CHUNK
    schedule = schedule or default_schedule(program, rows, n, dtypes)
    if schedule.warps % 4:
        raise ValueError(f"Mosaic's blocks consist of warpgroups, 4 warps each, got {schedule.warps} warps")
    segments, lanes = ROW_CONTRACT.segments(n), max(VECTOR, ROW_CONTRACT.lanes_for(n))
    warpgroups, groups, row_warpgroups, blocks = schedule.warps // 4, 1, 1, 1
    if segments == 1:
        groups = pl.cdiv(schedule.block_rows, warpgroups * (CHUNK // lanes))
    else:
        row_warpgroups, blocks = warpgroups // schedule.block_rows, 1 if schedule.cooperative else schedule.blocks_per_row
        if row_warpgroups == 0:
            raise ValueError(f"each of {schedule.block_rows} rows of {n} elements needs a warpgroup, there are {warpgroups}")
        if schedule.cooperative and not (program.reductions and segments <= MAX_TOGETHER):
            raise ValueError(f"only reductions of rows of up to {MAX_TOGETHER} segments are cooperative, a row has {segments}")
        if program.reductions and segments > CHUNK and blocks == 1:
            raise ValueError(f"a row of {n} elements needs blocks_per_row > 1")
    together = schedule.cooperative and segments > 1
    static = program, rows, n, count, tail, *named, lanes, groups, warpgroups, row_warpgroups, blocks, together
    plan = Plan(*static, held=False, keeps=False, grid=1)
    most = SMS * max(1, (4 if together else 16) // warpgroups)
    grid = max(1, min(plan.block_groups, most) if schedule.persistent or together else plan.block_groups)
    return dataclasses.replace(plan, grid=grid, **_what_stays_in_registers(plan))


def _what_stays_in_registers(plan: Plan) -> dict[str, bool]:
    """Elements, if they take no more than half of a thread's registers; and what is computed from them, if no more than 2/3."""
    budget = min(MAX_REGISTERS, REGISTERS // (THREADS * plan.warpgroups)) // 2
    if plan.segments > plan.workers or not (plan.segments == 1 or plan.program.reductions):
        return {"held": False, "keeps": False}
    chunks = plan.groups * min(pl.cdiv(plan.n, CHUNK), SEGMENT // CHUNK)
    dtypes = dict(plan.dtypes)
    elements = chunks * sum(VECTOR * jnp.dtype(dtypes[name]).itemsize // 4 for name in plan.program.elements)
    kept = chunks * VECTOR * len({x for stage in plan.formulas.stages for step in stage.steps for x in step.kept})
    return {"held": elements <= budget, "keeps": elements <= budget and kept <= budget * 4 // 3}


def default_schedule(program: RowProgram, rows: int, n: int, dtypes: Mapping[str, str]) -> RowSchedule:
    """A schedule that keeps enough loads under way: some 32 KiB an SM.

    Rows of one segment: a warpgroup a block, with as many rows as make four chunks. Longer rows: blocks of four warpgroups,
    which bounds the registers of a thread; five where exponentials of 16-bit elements leave some, two or three where two inputs
    need more, one or three where exponentials are all there is to compute. Where elements are needed again after a reduction,
    or rows are few, warpgroups wait for one another, each on its own, so that some compute while others load. Where nothing
    but outputs is to be computed, segments are as good as rows.
    """
    segments = ROW_CONTRACT.segments(n)
    exponentials = bool(program.reductions) and program.reductions[0].kind == "sum_exp"
    narrow = all(jnp.dtype(dtypes[name]).itemsize == 2 for name in program.elements)
    if segments == 1:
        lanes = max(VECTOR, ROW_CONTRACT.lanes_for(n))
        chunks = max(1, 4 // max(1, pl.cdiv(n, CHUNK) * len(program.elements)))
        while chunks > 1 and rows * lanes < SMS * 8 * chunks * CHUNK:
            chunks //= 2
        return RowSchedule(block_rows=chunks * (CHUNK // lanes), warps=4, persistent=bool(program.integers))
    warpgroups = min(4, 1 << (segments - 1).bit_length())
    if not program.reductions:
        return RowSchedule(warps=4, blocks_per_row=segments)
    needed_again = bool(program.outputs) or len(program.reductions) > 1
    within_a_block = segments <= warpgroups
    if segments <= MAX_TOGETHER and (rows < SMS or needed_again):
        warps = 20 if exponentials and narrow else 16
        if rows * segments <= 4 * SMS:
            warps = 4
        elif len(program.elements) > 1:
            warps = 12 if narrow and not within_a_block else 8
        return RowSchedule(warps=warps, cooperative=True)
    blocks = 1
    while segments > MAX_TOGETHER and (blocks < 2 or (rows * blocks < SMS and blocks * warpgroups < segments)):
        blocks *= 2
    if exponentials and blocks == 1 and (narrow or within_a_block):
        return RowSchedule(warps=4 if within_a_block else 12)
    return RowSchedule(block_rows=4 // warpgroups, warps=16, blocks_per_row=blocks)


def row_workspace_bytes(plan: Plan) -> int:
    """Bytes that a row program allocates beside its outputs: the results of segments, where blocks share a row."""
    if plan.segments == 1 or not (plan.together or plan.blocks > 1):
        return 0
    results = plan.rows * plan.segments * sum(map(partial_count, plan.formulas.stages))
    return 8 * (1 + results) if plan.together else 4 * results


def _launch(plan: Plan, operands: Arrays, rows: int, n: int) -> Arrays:
    """Run all phases: in one kernel, or in one for each reduction and one for the outputs."""
    stages = plan.formulas.stages
    size = plan.rows * plan.segments
    partials = [{f"{i}.{j}": (size, "float32") for j in range(partial_count(stage))} for i, stage in enumerate(stages)]
    last = len(stages)
    outputs = {name: (rows * n, dtype) for name, dtype in plan.out_dtypes}
    outputs |= dict.fromkeys(plan.program.row_outputs, (rows, "float32"))
    if plan.together:
        words: Any = jax.new_ref(jnp.zeros(row_workspace_bytes(plan) // 4, jnp.int32))
        return _call(plan, range(last + 1), {**operands, WORDS: words}, outputs)
    if plan.blocks == 1 or not stages:
        return _call(plan, range(last + 1), operands, outputs)
    for i, stage in enumerate(partials):
        operands = {**operands, **_call(plan, range(i, i + 1), operands, stage)}
    return _call(plan, range(last, last + 1), operands, outputs)


def _call(plan: Plan, phases: range, operands: Arrays, outputs: Mapping[str, tuple[int, str]]) -> Arrays:
    results = kernel(plan, phases, tuple(operands), outputs)(*operands.values())
    return dict(zip(outputs, results, strict=True))


def column_workspace_bytes(passes: Sequence[ColumnPass]) -> int:
    """Bytes that a column program allocates beside its outputs: the sums of all passes but the last."""
    return sum(4 * made.results * made.n * len(made.program.sums) for made in passes[:-1])


@cache
def _sums_of(names: tuple[str, ...]) -> ColumnProgram:
    """The sums of elements that are called as their sums are."""
    return ColumnProgram("sums", elements=names, sums={name: lambda f, e, name=name: getattr(e, name) for name in names})


def _dtypes(program: RowProgram | ColumnProgram, inputs: Arrays) -> dict[str, str]:
    return {name: inputs[name].dtype.name for name in (*program.elements, *program.columns)}


def _names(dtypes: Mapping[str, Any]) -> dict[str, str]:
    return {name: jnp.dtype(dtype).name for name, dtype in dtypes.items()}


def _items(dtypes: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(dtypes.items())


def _operands(program: RowProgram | ColumnProgram, inputs: Arrays, scalars: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The inputs as flat arrays; the call's scalars as an array, and its integers."""
    ids, integers = (program.ids, program.integers) if isinstance(program, RowProgram) else ((), ())
    operands = {name: inputs[name].reshape(-1) for name in (*program.elements, *program.columns, *program.rows, *ids)}
    if program.scalars:
        operands["scalars"] = jnp.stack([_scalar(scalars[name], np.float32) for name in program.scalars])
    if integers:
        operands["integers"] = jnp.stack([_scalar(scalars[name], np.int32) for name in integers])
    return operands


def _scalar(value: Any, dtype: Any) -> jax.Array:
    return value.astype(dtype) if isinstance(value, jax.Array) else jnp.asarray(dtype(value))
