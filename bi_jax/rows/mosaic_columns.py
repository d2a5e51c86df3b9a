"""Sums over rows for every column, on Hopper with Pallas Mosaic GPU.

The contract's lanes run along the rows: row r belongs to lane r % 1024. A thread has 8 columns and a few adjacent lanes. Its
sums are chains over the chunks of a segment; then come the trees over its own lanes, over the threads of a warp and over the
warps that have the same columns. What a block sums is an aligned power of two of lanes, so a subtree of the contract's
tree, and the blocks' results, put side by side, are the leaves of what is left of it: one more pass sums them, as lanes of
one row each, and so on until there is one.

Why the bits are right: the order is the contract's at every level. A lane without a row adds +0, and so does a missing
segment; sums that start at +0 are never -0, so that adding them to +0 in another pass changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bi_jax.rows.formulas import column_formulas, fold
from bi_jax.rows.ptx import Level, Node
from bi_jax.rows.values import WARP, Scope, combined
from bi_jax.rows.warpgroup import (
    CHUNK,
    THREADS,
    VECTOR,
    Load,
    LoadValue,
    Place,
    Ref,
    Rows,
    Shuffle,
    Store,
    Warps,
    width,
    zeros,
)
from shared_specs.rows import ColumnProgram

WARPS = THREADS // WARP


@dataclass(frozen=True)
class ColumnPass:
    """Everything static about one kernel.

    Attributes:
        program: what is summed.
        rows, n: of the elements.
        dtypes: of the elements and columns by name.
        out_dtypes: of the outputs by name, if this is the last pass.
        segment: rows of a segment, a multiple of `lanes`.
        lanes: of a segment, a power of two and a multiple of `block_lanes`.
        thread_lanes: lanes of a thread, a power of two.
        columns: of a block, a power of two from 8 to 256.
    """

    program: ColumnProgram
    rows: int
    n: int
    dtypes: tuple[tuple[str, str], ...]
    out_dtypes: tuple[tuple[str, str], ...]
    segment: int
    lanes: int
    thread_lanes: int
    columns: int

    @property
    def block_lanes(self) -> int:
        """Lanes that a block sums."""
        return self.thread_lanes * CHUNK // self.columns

    @property
    def results(self) -> int:
        """Rows of the result."""
        return pl.cdiv(self.rows, self.segment) * (self.lanes // self.block_lanes)


def kernel(plan: ColumnPass, inputs: Sequence[str]) -> Callable[..., list[jax.Array]]:
    """The kernel of one pass: flat inputs to [results * n] for each sum."""
    f, values = column_formulas(plan.program)
    dtypes, last = dict(plan.dtypes), plan.results == 1
    out_dtypes = dict(plan.out_dtypes) if last else dict.fromkeys(values, "float32")
    column_blocks, lane_groups = pl.cdiv(plan.n, plan.columns), plan.lanes // plan.block_lanes
    end = plan.n if plan.n % plan.columns else None
    row_number = f.input("row", Level.ROW, "int")
    so_far = {name: f.input(f"{name} so far", Level.ELEMENT) for name in values}

    def body(*args: Ref, scratch: Ref) -> None:
        refs, outs = dict(zip(inputs, args, strict=False)), args[len(inputs) :]
        block = lax.axis_index("block")
        index, column = lax.div(block, jnp.int32(column_blocks)), lax.rem(block, jnp.int32(column_blocks)) * plan.columns
        segment, group = lax.div(index, jnp.int32(lane_groups)), lax.rem(index, jnp.int32(lane_groups))
        first = segment * plan.segment + group * plan.block_lanes
        call = Scope(Level.CALL, lambda node: _scalar(plan.program, refs, node))
        call.prepare_for(list(values.values()))

        def load(name: str, row: Any, step: int, rows: int | None) -> jax.Array:
            place = Place(plan.n, plan.columns, step, rows, end)
            return Load(dtypes[name], place, width(dtypes[name], plan.n))(refs[name], row, column)

        shared = {name: load(name, 0, 0, None) for name in plan.program.columns}

        def scope(row: Any, bounded: bool) -> Scope:
            """The values of one row for every group of threads, its elements on their way."""
            bound = plan.rows if bounded else None

            def of_row(node: Node) -> jax.Array:
                place = Place(1, plan.columns, plan.thread_lanes, bound)
                return Rows(place)(row) if node is row_number else LoadValue("float32", place)(refs[node.operation], row, 0)

            def of_element(node: Node) -> jax.Array:
                return load(node.operation, row, plan.thread_lanes, bound)

            chunk = Scope(Level.ELEMENT, of_element, Scope(Level.ROW, of_row, call))
            chunk.values |= {f.input(name, Level.ELEMENT): value for name, value in shared.items()}
            chunk.load_for(list(values.values()), plan.program.elements)
            return chunk

        def add(chunk: Scope, sums: tuple[jax.Array, ...], bounded: bool) -> tuple[jax.Array, ...]:
            chunk.values |= dict(zip(so_far.values(), sums, strict=True))
            addends: Sequence[Node] = list(values.values())
            if bounded:
                addends = [f.select(f.int_less(row_number, plan.rows), value, 0.0) for value in addends]
            return tuple(chunk.get([fold(f, "sum", x, y) for x, y in zip(so_far.values(), addends, strict=True)]))

        def chunk_of_rows(bounded: bool) -> Callable:
            def step(i: Any, sums: tuple) -> tuple:
                scopes = [scope(first + i * plan.lanes + lane, bounded) for lane in range(plan.thread_lanes)]
                return tuple(add(chunk, of_lane, bounded) for chunk, of_lane in zip(scopes, sums, strict=True))

            return step

        sums = tuple(tuple(zeros() for _ in values) for _ in range(plan.thread_lanes))
        here = jnp.minimum(plan.rows - segment * plan.segment, plan.segment)
        whole = lax.div(here, jnp.int32(plan.lanes))
        if plan.rows >= plan.lanes:
            sums = lax.fori_loop(0, whole, chunk_of_rows(False), sums)
        if plan.rows % plan.lanes:
            sums = lax.fori_loop(whole, lax.div(here + plan.lanes - 1, jnp.int32(plan.lanes)), chunk_of_rows(True), sums)

        place = Place(plan.n, plan.columns, plan.results, plan.results, end)  # the first of the threads with a column stores
        for name, out, of_lanes in zip(values, outs, zip(*sums, strict=True), strict=True):
            total = _over_threads(plan, combined("sum", of_lanes), scratch)
            result = Scope(Level.ELEMENT, call.load, call)
            result.values[so_far[name]] = total
            root = f.canonical(so_far[name]) if last and out_dtypes[name] == "float32" else so_far[name]
            (total,) = result.get([root], [out_dtypes[name]])
            Store(out_dtypes[name], place, width(out_dtypes[name], plan.n))(out, index, column, total)

    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((plan.results * plan.n,), jnp.dtype(out_dtypes[name])) for name in values],
        grid=(column_blocks * plan.results,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="bi_columns",
        scratch_types={"scratch": plgpu.SMEM((CHUNK,), jnp.float32)},
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def _over_threads(plan: ColumnPass, x: jax.Array, scratch: Ref) -> jax.Array:
    """The tree over the threads that have the same columns."""
    distance = plan.columns // VECTOR
    while distance < WARP:
        x = combined("sum", [x, Shuffle(distance)(x)])
        distance *= 2
    return combined("sum", Warps(WARPS)(scratch, x))


def _scalar(program: ColumnProgram, refs: dict[str, Ref], node: Node) -> jax.Array:
    return LoadValue("float32", Place(0))(refs["scalars"], 0, program.scalars.index(node.operation))
