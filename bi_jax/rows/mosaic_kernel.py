"""Row and column programs on Hopper, with Pallas Mosaic GPU.

A warpgroup works on chunks of 1024 elements, 8 a thread (`bi_jax.rows.warpgroup`): they are the lanes of the row contract,
so that a row of N elements is ceil(N / 1024) chunks, and a chunk holds several rows shorter than that.

Why the bits are right: a lane's sum is a chain over the chunks of a segment, within a thread. The tree over lanes is written
out: adjacent pairs within a thread, then threads 1, 2, 4, 8, 16 apart, then warps 1 and 2 apart (the halves of the lanes
come last, where a thread has some of both); so is the tree over segments. Formulas are inline PTX. What lies behind a row's
end counts as a zero, or as an infinity for maxima and minima.

- A row of one segment stays in the registers of one warpgroup. A block has several warpgroups for more rows.
- The segments of a longer row are dealt out to the warpgroups of one block, which meet in shared memory; or to those of
  several blocks, which leave the results of their segments in memory for the next kernel (`Plan.blocks` > 1). There outputs
  find a segment's results, too, if they need them and its elements did not stay in registers.
- Or each warpgroup takes one segment of a longer row, keeps it, and waits until the row's other segments have left their
  results in memory (`Plan.together`). Tickets say which segment is next, and a warpgroup goes on until there is none, so those
  that it waits for are taken, or will be by warpgroups that wait for earlier rows at most: as many as a row has segments must
  fit on the GPU at a time.
- Elementwise programs run as rows of one chunk, whatever the shape; what is left over is the `tail`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bi_jax.branch import when
from bi_jax.index import quotient_and_rest
from bi_jax.rows.formulas import FILL, Combination, Formulas, Stage, Step, fold, row_formulas
from bi_jax.rows.ptx import Level, Node
from bi_jax.rows.values import WARP, Chunk, Scope, dtype_of, over_threads, over_warps, tree
from bi_jax.rows.warpgroup import (
    ACCESS,
    CHUNK,
    THREADS,
    VECTOR,
    Await,
    Columns,
    Draw,
    EveryThread,
    Extreme,
    FirstWarp,
    Lanes,
    Load,
    LoadValue,
    Pick,
    Place,
    Post,
    Ref,
    Share,
    Store,
    StoreValue,
    Sync,
    ThreadExtreme,
    width,
)
from shared_specs import sum_exp
from shared_specs.rows import ROW_CONTRACT, RowProgram

SEGMENT = ROW_CONTRACT.segment
WORDS = "words"
"""Zeros, int32, to be changed: the next ticket, and from the second word of 8 bytes on the results of segments."""

assert ROW_CONTRACT.lanes == CHUNK, ROW_CONTRACT


@dataclass(frozen=True)
class Plan:
    """Everything static about the kernels of one row program.

    Attributes:
        rows: rows, of `n` elements each.
        count: N to the formulas.
        tail: elements of one more row, of an elementwise program.
        dtypes: of the elements and columns by name.
        out_dtypes: of the outputs [rows, n] by name.
        lanes: elements of a row in a chunk.
        groups: chunks of rows that a warpgroup holds at a time, where a row is one segment.
        warpgroups: of a block.
        row_warpgroups: of them, those that share a row.
        blocks: that share a row.
        together: every segment of a row has a warpgroup, which waits for the others within one kernel.
        held: a warpgroup keeps its elements in registers from the first reduction to the outputs.
        keeps: it keeps what is computed from them, too, where that is worth it.
        grid: blocks, each of which walks over row groups.
    """

    program: RowProgram
    rows: int
    n: int
    count: int
    tail: int
    dtypes: tuple[tuple[str, str], ...]
    out_dtypes: tuple[tuple[str, str], ...]
    lanes: int
    groups: int
    warpgroups: int
    row_warpgroups: int
    blocks: int
    together: bool
    held: bool
    keeps: bool
    grid: int

    @property
    def segments(self) -> int:
        return ROW_CONTRACT.segments(self.n)

    @property
    def block_rows(self) -> int:
        """Rows of a block at a time."""
        return self.warpgroups // self.row_warpgroups * self.groups * (CHUNK // self.lanes)

    @property
    def row_groups(self) -> int:
        return pl.cdiv(self.rows, self.block_rows)

    @property
    def block_groups(self) -> int:
        """How often a block does its work, over all blocks."""
        if self.together:
            return pl.cdiv(self.rows * self.segments, self.warpgroups)
        return self.row_groups * self.blocks

    @property
    def workers(self) -> int:
        """Warpgroups that share a row."""
        return self.segments if self.together else self.blocks * self.row_warpgroups

    @property
    def formulas(self) -> Formulas:
        return row_formulas(self.program, self.count, self.segments == 1, self.out_dtypes)

    @property
    def run(self) -> int:
        """Consecutive elements of a thread: 16 bytes of the widest elements and outputs."""
        named = [(dict(self.dtypes), self.program.elements), (dict(self.out_dtypes), self.program.outputs)]
        sizes = [jnp.dtype(dtypes[name]).itemsize for dtypes, names in named for name in names]
        return min(VECTOR, ACCESS // max(sizes))

    @property
    def shared(self) -> int:
        """Chunks of rows whose numbers the threads of a row share out, so that each computes those of one row."""
        fits = self.groups & (self.groups - 1) == 0 and self.groups <= self.lanes // VECTOR
        return self.groups if fits else 1

    def place(self, stride: int, end: int | None = None, own: bool = True, shared: int = 1) -> Place:
        """A chunk's place in an array with a row for every row, its `own`, or with one row for all."""
        rows = self.rows if own and self.segments == 1 and self.rows % self.block_rows else None
        return Place(stride, self.lanes, int(own and self.lanes < CHUNK), rows, end, self.run, shared)

    def width(self, dtype: str, end: int | None) -> int:
        """Elements of an access to a chunk: rows begin at multiples of it, and so does what lies behind their `end`."""
        return width(dtype, self.run, self.n if self.rows > 1 else 0, end or 0)


@dataclass
class Worker:
    """The device code of a row program: what one warpgroup does.

    Attributes:
        refs: inputs by name; "scalars" and "integers" hold those of the call.
        out_refs: outputs by name.
        partials: for each stage, arrays of the results of segments.
        scratch: shared memory of this warpgroup, a value for each thread.
        totals: shared memory of this warpgroup for the sums over many segments.
        ticket: shared memory of this warpgroup for its next ticket.
        results: shared memory of this warpgroup for the results of a row.
    """

    plan: Plan
    refs: Mapping[str, Ref]
    out_refs: Mapping[str, Ref]
    partials: Sequence[Sequence[Ref]]
    scratch: Ref
    totals: Ref | None
    ticket: Ref | None
    results: Ref | None

    def __post_init__(self) -> None:
        self.formulas: Formulas = self.plan.formulas
        self.dtypes, self.out_dtypes = dict(self.plan.dtypes), dict(self.plan.out_dtypes)
        self.outputs = list(self.formulas.outputs.values())

    # Scopes

    def call(self) -> Scope:
        """The scope of the call, with everything that rows need of it."""
        program = self.plan.program

        def load(node: Node) -> jax.Array:
            ref, names = ("scalars", program.scalars) if node.kind == "float" else ("integers", program.integers)
            return LoadValue(dtype_of(node), Place(0))(self.refs[ref], 0, names.index(node.operation))

        scope = Scope(Level.CALL, load)
        values = [step.value for stage in self.formulas.stages for step in stage.steps]
        scope.prepare_for([*values, *self.outputs, *self.formulas.row_outputs.values()])
        return scope

    def row(self, call: Scope, row: Any, shared: int = 1) -> Scope:
        """The scope of the rows from `row` on, of `shared` chunks."""
        plan = self.plan

        def load(node: Node) -> jax.Array:
            name = node.operation
            if name in plan.program.gathered:
                element, index = plan.program.gathered[name]
                ids = load(self.formulas.listing.input(index, Level.ROW, "int"))
                return LoadValue(self.dtypes[element], plan.place(plan.n, plan.n, shared=shared))(self.refs[element], row, ids)
            return LoadValue(dtype_of(node), plan.place(1, shared=shared))(self.refs[name], row, 0)

        return Scope(Level.ROW, load, Scope(Level.CALL, call.load, call))

    def chunk(self, outer: Scope, row: Any, column: Any, end: int | None) -> Chunk:
        """The scope of one chunk."""
        plan = self.plan

        def load(node: Node) -> jax.Array:
            name = node.operation
            if node is self.formulas.column:
                return Columns(plan.lanes, plan.run)(column)
            dtype, own = self.dtypes[name], name in plan.program.elements
            load = Load(dtype, plan.place(plan.n, end, own), plan.width(dtype, end), own and plan.together and plan.held)
            return load(self.refs[name], row if own else 0, column)

        return Chunk(load, outer, column, end)

    def chunks(self, outer: Scope, row: Any, column: Any, length: int) -> list[Chunk]:
        """The scopes of the chunks of `length` elements from `column` on, behind which a row may end."""
        starts = range(0, length, CHUNK)
        ends = [None if start + self.plan.lanes <= length else self.plan.n for start in starts]
        return [self.chunk(outer, row, column + start, end) for start, end in zip(starts, ends, strict=True)]

    # What is done with rows of one segment

    def short_rows(self, call: Scope, row: Any) -> None:
        """All of the program for the rows from `row` on."""
        plan = self.plan
        starts = [row + group * (CHUNK // plan.lanes) for group in range(plan.groups)]
        scopes = [self.row(call, start) for start in starts]

        def chunks() -> list[list[Chunk]]:
            return [self.chunks(scope, start, 0, plan.n) for scope, start in zip(scopes, starts, strict=True)]

        rows = chunks()
        if plan.held:
            self.fetch(rows, [*(stage.steps[0].value for stage in self.formulas.stages), *self.outputs])
        owners = [(self.row(call, row, plan.shared), row)] if plan.shared > 1 else list(zip(scopes, starts, strict=True))
        for scope, _ in owners:  # beside the elements, not after them
            scope.load_for(list(self.formulas.row_outputs.values()), (*plan.program.rows, *plan.program.gathered))
        for stage in self.formulas.stages:
            rows = rows if plan.held else chunks()
            self.fetch(rows, [stage.steps[0].value])
            for scope, row_chunks in zip(scopes, rows, strict=True):
                self.reduce(stage, scope, row_chunks)
        rows = rows if plan.held else chunks()
        self.fetch(rows, self.outputs)
        for scope, start, row_chunks in zip(scopes, starts, rows, strict=True):
            self.store(scope, start, row_chunks)
        if plan.shared > 1 and self.formulas.row_outputs:
            for step in itertools.chain(*(stage.steps for stage in self.formulas.stages)):
                owners[0][0].values[step.result] = Pick()(*(scope.values[step.result] for scope in scopes))
        for scope, start in owners:
            self.store_row(scope, start, plan.shared)

    # What is done with rows of several segments

    def long_row(self, call: Scope, row: Any, at: Any, worker: Any, phases: range, meet: Callable[[int], None]) -> None:
        """The phases of a row: its reductions, then the outputs. Warpgroups `meet` between them.

        Args:
            call: the scope of the call.
            row: its number.
            at: the row of its partial results.
            worker: number of this warpgroup among those that share the row.
            phases: what is done.
            meet: waits for the other warpgroups at the end of a phase.
        """
        if not self.plan.held:
            self._phases(self.row(call, row), row, at, worker, phases, meet, None)
            return
        whole, rest = divmod(self.plan.n, SEGMENT)
        branches = [(worker < whole, [SEGMENT])]
        branches += [(worker == whole, [rest])] if rest else []
        branches += [(worker >= self.plan.segments, [])] if self.plan.workers > self.plan.segments else []
        for condition, lengths in branches:

            @when(condition)
            def _(lengths: list[int] = lengths) -> None:
                scope = self.row(call, row)
                held = [(worker, *self._segment(scope, row, at, worker, length)) for length in lengths]
                values = [stage.steps[0].value for stage in self.formulas.stages]
                self.fetch([chunks for _, _, chunks in held], [*values, *self.outputs])
                self._phases(scope, row, at, worker, phases, meet, held)

    def _phases(
        self, scope: Scope, row: Any, at: Any, worker: Any, phases: range, meet: Callable[[int], None], held: list | None
    ) -> None:
        stages = self.formulas.stages
        for phase in range(phases.start):
            self.combine(phase, scope, at)
        for phase in phases:
            if phase == len(stages):
                scope.prepare_for(self.outputs)
                self.each_segment(scope, row, at, worker, held, lambda _, part, chunks: self._store_segment(part, row, chunks))
                when(worker == 0)(lambda: self.store_row(scope, row))
            else:
                scope.prepare_for([stages[phase].steps[0].value])
                self.each_segment(scope, row, at, worker, held, functools.partial(self._partial, phase, at))
                if len(phases) > 1:
                    meet(phase)
                    (self.gather if self.plan.together else self.combine)(phase, scope, at)

    def each_segment(self, scope: Scope, row: Any, at: Any, worker: Any, held: list | None, run: Callable) -> None:
        """`run(index, scope, chunks)` for the segments of this worker."""
        plan = self.plan
        if held is not None:
            for index, part, chunks in held:
                run(index, part, chunks)
            return
        whole, rest = divmod(plan.n, SEGMENT)

        def segment(index: Any, length: int) -> None:
            run(index, *self._segment(scope, row, at, index, length))

        if whole:
            count = lax.div(whole - worker + plan.workers - 1, np.int32(plan.workers))
            pl.loop(0, count)(lambda i: segment(worker + i * plan.workers, SEGMENT))
        if rest:
            when(worker == whole % plan.workers)(lambda: segment(np.int32(whole), rest))

    def _segment(self, scope: Scope, row: Any, at: Any, index: Any, length: int) -> tuple[Scope, list[Chunk]]:
        """The scopes of a segment and of its chunks."""
        results = [step.result for stage in self.formulas.stages for step in stage.steps]

        def load(node: Node) -> jax.Array:
            number = results.index(node)
            if self.plan.together:
                return Await(self._words, (self._word(number),))(self.refs[WORDS], at, index)[0]
            return LoadValue("float32", Place(self.plan.segments))([*itertools.chain(*self.partials)][number], at, index)

        part = Scope(Level.SEGMENT, load, scope)
        return part, self.chunks(part, row, index * SEGMENT, length)

    def _partial(self, phase: int, at: Any, index: Any, part: Scope, chunks: list[Chunk]) -> None:
        """Leave the results of a segment for the others."""
        stage = self.formulas.stages[phase]
        self.fetch([chunks], [stage.steps[0].value])
        results = self.reduce(stage, part, chunks)
        if self.plan.together:
            for number, value in enumerate(results, self._first_result(phase)):
                Post(self._words, self._word(number))(self.refs[WORDS], at, index, value)
            return
        place = Place(self.plan.segments, end=self.plan.segments)
        for ref, value in zip(self.partials[phase], results, strict=True):
            StoreValue(place)(ref, at, index, value)

    def _first_result(self, phase: int) -> int:
        """The number of a stage's first result among those of a segment."""
        return sum(map(partial_count, self.formulas.stages[:phase]))

    @property
    def _words(self) -> Place:
        """Of results of segments in `WORDS`."""
        return Place(self.plan.segments, end=self.plan.segments)

    def _word(self, number: int) -> int:
        """Where in `WORDS` a result of each segment begins."""
        return 1 + number * self.plan.rows * self.plan.segments

    def _store_segment(self, part: Scope, row: Any, chunks: list[Chunk]) -> None:
        self.fetch([chunks], self.outputs)
        self.store(part, row, chunks)

    # Steps of both

    def fetch(self, rows: Sequence[Sequence[Chunk]], roots: Sequence[Node]) -> None:
        """Load what `roots` need of the chunks, so that all loads are under way before the first is waited for."""
        for chunks in rows:
            for chunk in chunks:
                chunk.load_for(roots, self.plan.program.elements)

    def reduce(self, stage: Stage, scope: Scope, chunks: Sequence[Chunk]) -> list[jax.Array]:
        """The results of the steps of `stage` over `chunks`, which are also left in `scope`."""
        near = None
        for step in stage.steps:
            if step.kind == "max" and step is not stage.steps[-1] and self._is_narrow(step.value):
                scope.values[step.result], near = self._extremes(step, scope, chunks)
            else:
                scope.values[step.result] = self._fold(step, chunks, near)
        return [scope.values[step.result] for step in stage.steps]

    def _is_narrow(self, node: Node) -> bool:
        """Whether it is an element of 16 bits."""
        return node.operation in self.plan.program.elements and jnp.dtype(self.dtypes[node.operation]).itemsize == 2

    def _extremes(self, step: Step, scope: Scope, chunks: Sequence[Chunk]) -> tuple[jax.Array, jax.Array]:
        """The maximum over elements of 16 bits, which are compared as they are, and in which warps all are near it."""
        largest = smallest = None
        for chunk in chunks:
            chunk.prepare([step.value])
            x = value = chunk.values[step.value]
            if chunk.end is not None:  # the zeros behind it may be the smallest
                masked = self.formulas.masked(step.value, chunk.end, FILL["max"])
                (value,) = chunk.get([masked], [self.dtypes[step.value.operation]])
            largest = value if largest is None else Extreme("max")(largest, value)
            smallest = x if smallest is None else Extreme("min")(smallest, x)
        maximum = over_warps("max", ThreadExtreme("max")(largest), self.plan.lanes, self.scratch)
        f = self.formulas.listing
        lowest = f.input("lowest", step.result.level)
        own = Scope(scope.level, scope.load, scope)
        own.values |= {lowest: ThreadExtreme("min")(smallest), step.result: maximum}
        (near,) = own.get([f.select(sum_exp.near(f, lowest, step.result), 1, 0)])
        return maximum, EveryThread()(near)

    def _fold(self, step: Step, chunks: Sequence[Chunk], near: jax.Array | None = None) -> jax.Array:
        """A lane's chain over the chunks, then the tree over lanes. `near`: in which warps `step.near` holds."""
        f, lanes = self.formulas.listing, self.plan.lanes
        so_far, accumulator = f.input("so far", Level.ELEMENT), None
        for chunk in chunks:
            start: Node | float = FILL[step.kind]
            if accumulator is not None:
                start, chunk.values[so_far] = so_far, accumulator

            def folded(value: Node, chunk: Chunk = chunk, start: Node | float = start) -> Node:
                value = value if chunk.end is None else self.formulas.masked(value, chunk.end, FILL[step.kind])
                return fold(f, step.kind, start, value)

            kept = step.kept if self.plan.keeps else ()
            assert near is None or {*kept} <= {step.value}, step
            cheaper = None if near is None else (near, (folded(step.near), *(step.near for _ in kept)))
            (accumulator,) = chunk.get([folded(step.value)], keep=kept, near=cheaper)
            chunk.values.pop(so_far, None)
            chunk.forget(self.plan.program.columns)
        return tree(step.kind, accumulator, lanes, self.scratch, self.plan.run)

    def gather(self, phase: int, scope: Scope, at: Any) -> None:
        """The row's results from row `at` of those that its segments post: one warp waits for them, one a thread."""
        stage, count = self.formulas.stages[phase], self.plan.segments
        lanes = ROW_CONTRACT.lanes_for(count)
        row = Scope(scope.level, scope.load, scope)  # what other warps compute is void
        own, columns = Scope(Level.ELEMENT, scope.load, row, THREADS), Lanes(lanes)()
        own.values[self.formulas.column] = columns
        first, parts = self._first_result(phase), stage.combinations[-1].parts
        awaited = Await(self._words, tuple(self._word(first + i) for i in range(len(parts))), WARP)
        own.values |= zip(parts, awaited(self.refs[WORDS], at, columns), strict=True)
        for combination in stage.combinations:
            root = self.formulas.masked(combination.value, count, FILL[combination.kind])
            row.values[combination.result] = over_threads(combination.kind, own.get([root])[0], lanes)
        results = [combination.result for combination in stage.combinations]
        scope.values |= zip(results, Share()(self.results, *(row.values[x] for x in results)), strict=True)

    def combine(self, phase: int, scope: Scope, at: Any) -> None:
        """The row's results from row `at` of those of its segments."""
        stage = self.formulas.stages[phase]
        parts = dict(zip(stage.combinations[-1].parts, self.partials[phase], strict=True))

        def chunk(first: Any) -> Scope:
            count = self.plan.segments

            def load(node: Node) -> jax.Array:
                if node is self.formulas.column:
                    return Columns(_lanes(count))(first)
                place = Place(count, _lanes(count), end=count)
                return Load("float32", place, width("float32", count))(parts[node], at, first)

            return Scope(Level.ELEMENT, load, scope)

        if self.plan.segments > CHUNK:
            for combination in stage.combinations:
                scope.values[combination.result] = self._total_of_many(combination, scope, chunk)
            return
        own = chunk(0)
        own.prepare(list(parts))  # all loads are under way before the first is waited for
        for combination in stage.combinations:
            scope.values[combination.result] = self._total(combination, own)

    def _total(self, combination: Combination, chunk: Scope) -> jax.Array:
        """The tree over up to 1024 segments."""
        root = self.formulas.masked(combination.value, self.plan.segments, FILL[combination.kind])
        return tree(combination.kind, chunk.get([root])[0], _lanes(self.plan.segments), self.scratch)

    def _total_of_many(self, combination: Combination, scope: Scope, chunk_at: Callable[[Any], Scope]) -> jax.Array:
        """The tree over segments, 1024 at a time, then over those."""
        kind, count = combination.kind, self.plan.segments
        totals, groups = self.totals, pl.cdiv(count, CHUNK)
        scope.prepare_for([combination.value])
        Sync()()

        @pl.loop(0, groups)
        def _(i: Any) -> None:
            StoreValue(Place(0))(totals, 0, i, self._total(combination, chunk_at(i * CHUNK)))

        Sync()()
        lanes, node = _lanes(groups), self.formulas.listing.input("total", Level.ELEMENT)
        chunk = self.chunk(scope, 0, 0, groups)
        chunk.values[node] = Load("float32", Place(0, lanes, end=groups), width("float32", groups))(totals, 0, 0)
        chunk.values[self.formulas.column] = Columns(lanes)(0)
        return tree(kind, chunk.get([self.formulas.masked(node, groups, FILL[kind])])[0], lanes, self.scratch)

    def store(self, scope: Scope, row: Any, chunks: Sequence[Chunk]) -> None:
        """The outputs of chunks."""
        plan, names = self.plan, list(self.formulas.outputs)
        if not names:
            return
        dtypes = [self.out_dtypes[name] for name in names]
        for chunk in chunks:
            values = chunk.get(self.outputs, dtypes)
            for name, dtype, value in zip(names, dtypes, values, strict=True):
                store = Store(dtype, plan.place(plan.n, chunk.end), plan.width(dtype, chunk.end), plan.together)
                store(self.out_refs[name], row, chunk.column, value)

    def store_row(self, scope: Scope, row: Any, shared: int = 1) -> None:
        """The numbers of rows. What is computed for them stays here; of a whole row, one warp computes it."""
        roots = self.formulas.row_outputs

        def store() -> None:
            own = Scope(scope.level, scope.load, scope)
            for name, value in zip(roots, own.get(list(roots.values())), strict=True):
                StoreValue(self.plan.place(1, shared=shared))(self.out_refs[name], row, 0, value)

        if roots:
            (when(FirstWarp()() != 0) if self.plan.lanes == CHUNK else lambda run: run())(store)


def _lanes(n: int) -> int:
    """Lanes for `n` elements: no fewer than a thread holds."""
    return max(VECTOR, ROW_CONTRACT.lanes_for(n))


def partial_count(stage: Stage) -> int:
    """Results that a segment leaves."""
    return len(stage.steps)


def kernel(plan: Plan, phases: range, inputs: Sequence[str], outputs: Mapping[str, tuple[int, str]]) -> Callable:
    """A kernel for some phases of the program: inputs, then the partial results of earlier phases, to `outputs`.

    Args:
        plan: of the program.
        phases: the reductions by number, and the outputs as the last; all of them in one kernel unless blocks share a row.
        inputs: names of the inputs, flat arrays; of blocks that run together, with `WORDS`.
        outputs: elements and dtype of each output by name; those of partial results are called "0.0", "0.1", ....
    """
    stages = plan.formulas.stages
    shared = plan.segments > 1 and len(phases) > 1 and not plan.together
    names = [[f"{i}.{j}" for j in range(partial_count(stage))] for i, stage in enumerate(stages)]
    scratch: dict[str, Any] = {"scratch": plgpu.SMEM((plan.warpgroups, CHUNK // VECTOR), jnp.float32)}
    if plan.segments > CHUNK:
        scratch["totals"] = plgpu.SMEM((plan.warpgroups, CHUNK), jnp.float32)
    if plan.together:
        scratch["ticket"] = plgpu.SMEM((plan.warpgroups, 1), jnp.int32)
        scratch["results"] = plgpu.SMEM((plan.warpgroups, max(len(stage.combinations) for stage in stages)), jnp.float32)
    if shared:
        shape = plan.block_rows, plan.segments
        scratch |= {name: plgpu.SMEM(shape, jnp.float32) for stage in names for name in stage}
        scratch["meeting"] = plgpu.Barrier(num_arrivals=plan.row_warpgroups, num_barriers=plan.block_rows)

    def body(*args: Ref, **scratch: Ref) -> None:
        refs, out_refs = dict(zip(inputs, args, strict=False)), dict(zip(outputs, args[len(inputs) :], strict=True))
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        partials = [[(refs | out_refs | scratch).get(name) for name in stage] for stage in names]
        own = [scratch[name].at[warpgroup] if name in scratch else None for name in ("scratch", "totals", "ticket", "results")]
        worker = Worker(plan, refs, out_refs, partials, *own)
        call = worker.call()

        def segment(index: Any) -> Any:
            row, part = quotient_and_rest(index, plan.segments)
            worker.long_row(call, row, row, part, phases, lambda _: None)
            return Draw()(worker.ticket, refs[WORDS])

        if plan.together:  # a warpgroup must not end while tickets are left: others may wait for who takes them
            lax.while_loop(lambda index: index < plan.rows * plan.segments, segment, Draw()(worker.ticket, refs[WORDS]))
            return

        def group(i: Any) -> None:
            index = block + i * plan.grid
            if plan.segments == 1:
                worker.short_rows(call, (index * plan.warpgroups + warpgroup) * (plan.block_rows // plan.warpgroups))
                return
            slot, member = quotient_and_rest(warpgroup, plan.row_warpgroups)
            index, part = quotient_and_rest(index, plan.blocks)
            row = index * plan.block_rows + slot

            def meet(_: int) -> None:
                plgpu.barrier_arrive(scratch["meeting"].at[slot])
                plgpu.barrier_wait(scratch["meeting"].at[slot])

            @when(row < plan.rows)
            def _() -> None:
                worker.long_row(call, row, slot if shared else row, part * plan.row_warpgroups + member, phases, meet)
                if shared and plan.grid < plan.row_groups:
                    meet(phases.stop)  # the partial results may still be read

        total = plan.block_groups
        if plan.grid >= total:
            if total:
                group(0)
        else:
            pl.loop(0, lax.div(total - block + plan.grid - 1, plan.grid))(group)
        if plan.tail:
            last = dataclasses.replace(plan, rows=plan.rows + 1, tail=0)
            rest = Worker(last, refs, out_refs, partials, *own)

            @when((block == 0) & (warpgroup == 0))
            def _() -> None:
                scope = rest.row(call, plan.rows)
                rest.store(scope, plan.rows, [rest.chunk(scope, plan.rows, 0, plan.tail)])

    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((size,), jnp.dtype(dtype)) for size, dtype in outputs.values()],
        grid=(plan.grid,),
        grid_names=("block",),
        num_threads=plan.warpgroups,
        thread_name="warpgroup",
        kernel_name="bi_rows",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
