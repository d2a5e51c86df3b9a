"""Launches the Triton kernels of row and column programs: which kernels, which tiles, which grid.

Everything that depends on shapes, strides and dtypes alone is decided once and kept as a `Plan`, so that a call costs a
dictionary look-up and its launches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

import torch
import triton

from bi_torch.device import FIRST_LAUNCH, architecture, bind_context, direct_launcher, multiprocessors, new_tensor
from bi_torch.direct import ALIGNMENT as _ALIGNMENT
from bi_torch.direct import keep, signature
from bi_torch.rows import triton_kernels
from bi_torch.rows.schedule import (
    MOST_COOPERATING,
    column_cover,
    is_resident,
    pointwise_cover,
    power_of_two,
    register_limit,
    row_cover,
    row_schedule,
    step_segments,
)
from bi_torch.rows.triton_arithmetic import Formulas
from bi_torch.rows.triton_shared_rows import rows_shared
from shared_specs.row_schedule import RowSchedule
from shared_specs.rows import ROW_CONTRACT, ColumnProgram, RowProgram
from shared_specs.trace import is_elementwise, reads

_NO_OUTS: Mapping[str, torch.Tensor] = {}

_MAX_UNIT = 16
"""Elements: what N and the strides are multiples of, as far as a kernel needs to know."""

_MOST_COUNT = 1024
"""Results of segments that a program reads to finish a reduction; longer rows are combined first."""

_COMBINED = 4096
"""Results of segments that become one in `combine`."""

_MOST_COLUMNS_COUNT = 64
"""Rows that one program of `column_tree` sums."""


def run_rows(
    program: RowProgram,
    inputs: Mapping[str, torch.Tensor],
    scalars: Mapping[str, float | int],
    out_dtypes: Mapping[str, torch.dtype],
    *,
    outs: Mapping[str, torch.Tensor] | None = None,
    schedule: RowSchedule | None = None,
) -> dict[str, torch.Tensor]:
    """Every output of a row program, on the current stream.

    Args:
        program: what is computed.
        inputs: elements [R, N] with contiguous columns and any row stride, columns [N], rows float32 [R], ids int32 or
            int64 [R].
        scalars: floats, rounded to float32 once, and int32 integers.
        out_dtypes: of the outputs, and of row outputs that are not float32.
        outs: outputs that exist; one may be an input that a pointwise program updates.
        schedule: overrides the default.
    """
    return _run(program, inputs, scalars, out_dtypes, outs or _NO_OUTS, schedule)


def run_columns(
    program: ColumnProgram,
    inputs: Mapping[str, torch.Tensor],
    scalars: Mapping[str, float | int],
    out_dtypes: Mapping[str, torch.dtype],
    *,
    schedule: RowSchedule | None = None,
) -> dict[str, torch.Tensor]:
    """The sums [N] of a column program; arguments as for `run_rows`. Of the schedule, `block_rows` and `warps` count."""
    return _run(program, inputs, scalars, out_dtypes, _NO_OUTS, schedule)


def _run(
    program: RowProgram | ColumnProgram,
    inputs: Mapping[str, torch.Tensor],
    scalars: Mapping[str, float | int],
    out_dtypes: Mapping[str, torch.dtype],
    outs: Mapping[str, torch.Tensor],
    schedule: RowSchedule | None,
) -> dict[str, torch.Tensor]:
    given = [inputs[name] for name in _tensor_names(program)]
    key = (
        program, schedule, *map(signature, given), *out_dtypes.items(), *((name, signature(x)) for name, x in outs.items()),
    )  # fmt: skip
    plan = _PLANS.get(key)
    if plan is None:
        plan = keep(_PLANS, key, prepare(program, given, out_dtypes, outs, schedule), _MAX_PLANS)
    integers = program.integers if isinstance(program, RowProgram) else ()
    return plan.run(
        given, tuple(float(scalars[name]) for name in program.scalars), tuple(int(scalars[name]) for name in integers), outs
    )


def prepare(
    program: RowProgram | ColumnProgram,
    given: Sequence[torch.Tensor],
    out_dtypes: Mapping[str, torch.dtype],
    outs: Mapping[str, torch.Tensor] = _NO_OUTS,
    schedule: RowSchedule | None = None,
) -> "Plan":
    """The plan of all calls whose tensors have the signatures (`bi_torch.direct`) of these; arguments as for `run_rows`."""
    architecture(given[0].device.index, "bi_torch.rows")
    if isinstance(program, RowProgram):
        return _rows_plan(program, given, out_dtypes, outs, schedule)
    return _columns_plan(program, given, out_dtypes, outs, schedule)


@dataclass
class _Call:
    """What the kernels of one call read and write, in the order of their arguments."""

    inputs: tuple[torch.Tensor, ...]
    scalars: tuple[float, ...]
    integers: tuple[int, ...]
    outputs: dict[str, torch.Tensor]
    workspace: tuple[torch.Tensor, ...]
    words: torch.Tensor | None


@dataclass
class Launch:
    """A kernel with everything but its tensors and scalars, which `arguments` knows from what a call is.

    `run` is filled in by the first launch.
    """

    kernel: Any
    grid: int
    arguments: Callable[[Any], tuple[Any, ...]]
    warps: int
    registers: int | None = None
    run: Callable[..., None] | None = None
    stages: int = 1

    @property
    def options(self) -> dict[str, Any]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False, **limit}

    def __call__(self, device: int, call: Any) -> None:
        """Launch on the current stream of the current device; a profiler's hooks see a full launch."""
        arguments = self.arguments(call)
        if self.run is None or triton.knobs.runtime.launch_enter_hook.calls:
            self.kernel.warmup(*arguments, grid=(self.grid,), **self.options)  # compiles, on any number of threads at once
            with FIRST_LAUNCH:
                self.run = direct_launcher(self.kernel[(self.grid,)](*arguments, **self.options), (self.grid, 1, 1))
        else:
            self.run(torch._C._cuda_getCurrentRawStream(device), arguments)


@dataclass
class Plan:
    """The launches of a call.

    Attributes:
        launches: in order.
        outputs: (name, shape, dtype) of every output.
        workspace: sizes of the float32 buffers.
        contiguous: which inputs have to be made so first, by position.
        words: size of an int64 buffer of zeros.
    """

    launches: list[Launch]
    outputs: list[tuple[str, tuple[int, ...], torch.dtype]]
    workspace: list[int]
    contiguous: list[int]
    words: int = 0

    def with_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> "Plan":
        """The same launches, with outputs of other shapes, whose elements have the same order."""
        if self.contiguous:
            raise ValueError("inputs must not be copied")
        return replace(self, outputs=[(name, shapes[name], dtype) for name, _, dtype in self.outputs])

    def run(
        self,
        given: list[torch.Tensor],
        scalars: tuple[float, ...],
        integers: tuple[int, ...],
        outs: Mapping[str, torch.Tensor] = _NO_OUTS,
    ) -> dict[str, torch.Tensor]:
        """Every output, by name, on the current stream; `given` in the order of elements, columns, rows and ids."""
        bind_context()
        call = self.call(given, scalars, integers, outs)
        device = given[0].get_device()
        if device == torch._C._cuda_getDevice():
            for launch in self.launches:
                launch(device, call)
        else:
            with torch.cuda.device(device):
                for launch in self.launches:
                    launch(device, call)
        return call.outputs

    def call(
        self,
        given: list[torch.Tensor],
        scalars: tuple[float, ...],
        integers: tuple[int, ...],
        outs: Mapping[str, torch.Tensor] = _NO_OUTS,
    ) -> _Call:
        """What the launches read and write, allocated as far as it is not given."""
        for position in self.contiguous:
            given[position] = given[position].contiguous()
        device = given[0].device
        outputs = {}
        for name, shape, dtype in self.outputs:
            outputs[name] = outs[name] if name in outs else new_tensor(shape, dtype, device)
        workspace = tuple([new_tensor((size,), torch.float32, device) for size in self.workspace])
        words = torch.zeros(self.words, dtype=torch.int64, device=device) if self.words else None
        return _Call(tuple(given), scalars, integers, outputs, workspace, words)


_PLANS: dict[tuple[Any, ...], Plan] = {}
_MAX_PLANS = 1 << 14


def _tensor_names(program: RowProgram | ColumnProgram) -> tuple[str, ...]:
    ids = program.ids if isinstance(program, RowProgram) else ()
    return (*program.elements, *program.columns, *program.rows, *ids)


@dataclass(frozen=True)
class _Parts:
    """The inputs of a call by kind; `slices` says where each kind stands. A plan keeps this, and no tensor."""

    slices: tuple[slice, slice, slice, slice]

    def __call__(self, call: _Call) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Elements, columns, rows, ids."""
        inputs = call.inputs
        elements, columns, rows, ids = self.slices
        return inputs[elements], inputs[columns], inputs[rows], inputs[ids]


@dataclass
class _Shape:
    """R and N of a call, and its tensors by kind."""

    program: RowProgram | ColumnProgram
    given: Sequence[torch.Tensor]

    def __post_init__(self) -> None:
        self.elements = len(self.program.elements)
        self.rows, self.n = self.given[0].shape
        kinds = (self.program.elements, self.program.columns, self.program.rows, getattr(self.program, "ids", ()))
        elements, columns, rows, ids = (
            slice(end - len(kind), end) for kind, end in zip(kinds, accumulate(map(len, kinds)), strict=True)
        )
        self.parts = _Parts((elements, columns, rows, ids))
        for name, x in zip(self.program.elements, self.given, strict=False):
            if x.shape != (self.rows, self.n) or (x.numel() and self.n > 1 and x.stride(1) != 1):
                raise ValueError(f"{self.program.name}: {name} must be [{self.rows}, {self.n}] with contiguous columns")
        for name, x in zip(_tensor_names(self.program)[self.elements :], self.given[self.elements :], strict=True):
            extent = self.n if name in self.program.columns else self.rows
            if x.shape != (extent,):
                raise ValueError(f"{self.program.name}: {name} must be [{extent}], got {list(x.shape)}")

    def pitch(self, x: torch.Tensor) -> int:
        """The row stride; that of one row, or of none, means nothing."""
        return x.stride(0) if self.rows > 1 else self.n

    def contiguous(self) -> list[int]:
        """Positions of inputs [N] and [R] that are not contiguous."""
        return [i for i, x in enumerate(self.given) if i >= self.elements and not x.is_contiguous()]


def _unit(*extents: int) -> int:
    """The largest power of two that divides them all, up to a limit."""
    unit = _MAX_UNIT
    while any(extent % unit for extent in extents):
        unit //= 2
    return unit


def _vector(*tensors: torch.Tensor | torch.dtype) -> int:
    """Elements of the narrowest of these in one access."""
    return _ALIGNMENT // min(x.itemsize for x in tensors)


def _rows_plan(
    program: RowProgram,
    given: Sequence[torch.Tensor],
    out_dtypes: Mapping[str, torch.dtype],
    outs: Mapping[str, torch.Tensor],
    schedule: RowSchedule | None,
) -> Plan:
    shape = _Shape(program, given)
    rows, n, parts = shape.rows, shape.n, shape.parts
    outputs: list[tuple[str, tuple[int, ...], torch.dtype]]
    outputs = [(name, (rows, n), out_dtypes[name]) for name in program.outputs]
    outputs += [(name, (rows,), out_dtypes.get(name, torch.float32)) for name in program.row_outputs]
    for name, extents, dtype in outputs:
        if name in outs and (outs[name].shape != extents or outs[name].dtype != dtype):
            raise ValueError(f"{program.name}: outs[{name!r}] must be {list(extents)} {dtype}")
    plan = Plan([], outputs, [], shape.contiguous())
    if rows == 0 or (n == 0 and not program.row_outputs):
        return plan
    pitches = [shape.pitch(x) for x in given[: shape.elements]]
    output_pitches = [shape.pitch(outs[name]) if name in outs else n for name in program.outputs]
    if schedule is None and is_elementwise(program) and set(pitches) | set(output_pitches) == {n}:
        plan.launches.append(_pointwise_launch(shape, [*given[: shape.elements], *out_dtypes.values()]))
        return plan
    if n > 2**31 - 1 and reads(program, "column"):
        raise ValueError(f"{program.name}: rows must not have more than {2**31 - 1} elements, got {n}")
    kinds = tuple(reduction.kind for reduction in program.reductions)
    gathered = tuple((program.elements.index(x), program.ids.index(i)) for x, i in program.gathered.values())
    unit = _unit(n, *pitches, *output_pitches)
    strides, output_strides = (tuple(pitch // unit for pitch in of) for of in (pitches, output_pitches))
    vector = _vector(*given[: shape.elements], *(dtype for _, extents, dtype in outputs if len(extents) == 2))

    schedule = schedule or row_schedule(rows, n, shape.elements, vector, len(program.reductions), outputs=bool(program.outputs))
    if schedule.warps != power_of_two(schedule.warps):
        raise ValueError(f"{program.name}: Triton's blocks have a power of two of warps, got {schedule.warps}")
    if n <= ROW_CONTRACT.segment and schedule.blocks_per_row > 1:
        raise ValueError(f"{program.name}: blocks share segments, a row of {n} elements has one")
    if n > ROW_CONTRACT.segment and schedule.block_rows > 1:
        raise ValueError(f"{program.name}: a block takes one row of more than a segment at a time, got {schedule}")

    def tensors(call: _Call) -> tuple[Any, ...]:
        values = tuple(call.outputs.values())
        split = len(program.outputs)
        elements, columns, per_row, ids = parts(call)
        return (
            elements, strides, columns, per_row, ids, call.scalars, call.integers,
            values[:split], output_strides, values[split:],
        )  # fmt: skip

    constants = (Formulas(program), gathered, unit)
    if is_resident(n, schedule, shape.elements):
        cover = row_cover(n, schedule, vector)
        blocks = triton.cdiv(rows, schedule.block_rows)
        grid = min(blocks, _persistent_programs(schedule, given[0].device.index)) if schedule.persistent else blocks
        tail = (
            rows, n // unit, *constants, cover.full_chunks(n), schedule.block_rows, cover.segments, cover.chunks, cover.lanes,
            cover.piece, ROW_CONTRACT.segment, schedule.persistent,
        )  # fmt: skip
        plan.launches.append(Launch(triton_kernels.rows_resident, grid, lambda call: (*tensors(call), *tail), schedule.warps))
    elif schedule.cooperative:
        _add_shared(plan, shape, schedule, kinds, constants, vector, tensors)
    else:
        _add_stages(plan, shape, schedule, kinds, constants, vector, tensors)
    return plan


def _add_shared(
    plan: Plan,
    shape: _Shape,
    schedule: RowSchedule,
    kinds: tuple[str, ...],
    constants: tuple[Any, ...],
    vector: int,
    tensors: Callable[[_Call], tuple[Any, ...]],
) -> None:
    """The launch of `rows_shared`."""
    rows, n = shape.rows, shape.n
    segments = ROW_CONTRACT.segments(n)
    if segments > MOST_COOPERATING or schedule.block_rows > 1:
        raise ValueError(f"{shape.program.name}: at most {MOST_COOPERATING} blocks of one row can wait for each other")
    cover = row_cover(n, schedule, vector, 1)
    plan.words = 1 + rows * segments * sum(map(_components, kinds))
    tail = (
        rows, n // constants[-1], segments, *constants, cover.chunks if n % cover.width == 0 else 0, cover.chunks, cover.lanes,
        cover.piece, ROW_CONTRACT.segment, max(power_of_two(segments), 32 * schedule.warps),
    )  # fmt: skip

    def arguments(call: _Call) -> tuple[Any, ...]:
        return (*tensors(call), call.words, *tail)

    held = sum(x.itemsize for x in shape.given[: shape.elements])
    limit = register_limit(held, outputs=any(len(extents) > 1 for _, extents, _ in plan.outputs))
    plan.launches.append(Launch(rows_shared, rows * segments, arguments, schedule.warps, limit))


def _add_stages(
    plan: Plan,
    shape: _Shape,
    schedule: RowSchedule,
    kinds: tuple[str, ...],
    constants: tuple[Any, ...],
    vector: int,
    tensors: Callable[[_Call], tuple[Any, ...]],
) -> None:
    """The launches of `rows_staged`, and of `combine` between them where rows are very long."""
    rows, n = shape.rows, shape.n
    segments = ROW_CONTRACT.segments(n)
    step = min(step_segments(schedule, shape.elements), power_of_two(segments))
    cover = row_cover(n, schedule, vector, step)
    counts = [segments]
    while counts[-1] > _MOST_COUNT:
        counts.append(triton.cdiv(counts[-1], _COMBINED))
    plan.workspace = [rows * count for kind in kinds for _ in range(_components(kind)) for count in counts]

    def buffers(call: _Call, level: int) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Results at one level of combination: for each reduction a buffer for each number of its result."""
        return _by_reduction(call.workspace[level :: len(counts)], kinds)

    blocks = triton.cdiv(rows, schedule.block_rows)
    last = len(kinds) + 1
    single = schedule.blocks_per_row == 1 and len(counts) == 1
    per_row = min(schedule.blocks_per_row, triton.cdiv(segments, step))
    index = triton.language.int64 if n > 2**31 - 2**20 else triton.language.int32
    full = cover.chunks if n % cover.width == 0 else 0
    tail = (
        rows, n // constants[-1], segments, counts[-1], per_row, *constants, full, schedule.block_rows,
        cover.segments, cover.chunks, cover.lanes, cover.piece, ROW_CONTRACT.segment, power_of_two(counts[-1]),
    )  # fmt: skip

    def stages(first: int, end: int) -> Launch:
        def arguments(call: _Call) -> tuple[Any, ...]:
            return (*tensors(call), buffers(call, 0), buffers(call, len(counts) - 1), *tail, first, end, index)

        return Launch(triton_kernels.rows_staged, blocks * per_row, arguments, schedule.warps)

    def combination(stage: int, level: int) -> Launch:
        def arguments(call: _Call) -> tuple[Any, ...]:
            source, target = buffers(call, level)[stage], buffers(call, level + 1)[stage]
            return (source, target, counts[level], counts[level + 1], kinds[stage], _COMBINED)

        return Launch(triton_kernels.combine, rows * counts[level + 1], arguments, 4)

    if single:
        plan.launches.append(stages(0, last))
        return
    for stage in range(last):
        plan.launches.append(stages(stage, stage + 1))
        if stage < len(kinds):
            plan.launches += [combination(stage, level) for level in range(len(counts) - 1)]


def _by_reduction(buffers: Sequence[torch.Tensor], kinds: tuple[str, ...]) -> tuple[tuple[torch.Tensor, ...], ...]:
    """The buffers of each reduction, one for each number of its result."""
    rest = iter(buffers)
    return tuple(tuple(islice(rest, _components(kind))) for kind in kinds)


def _components(kind: str) -> int:
    return 2 if kind == "sum_exp" else 1


def _pointwise_launch(shape: _Shape, operands: Sequence[torch.Tensor | torch.dtype]) -> Launch:
    total = shape.rows * shape.n
    warps, block, repeat = pointwise_cover(total, shape.elements, _vector(*operands))
    tail = (total, Formulas(shape.program), block, repeat)

    def arguments(call: _Call) -> tuple[Any, ...]:
        return (call.inputs, call.scalars, call.integers, tuple(call.outputs.values()), *tail)

    return Launch(triton_kernels.pointwise, triton.cdiv(total, block * repeat), arguments, warps)


def _columns_plan(
    program: ColumnProgram,
    given: Sequence[torch.Tensor],
    out_dtypes: Mapping[str, torch.dtype],
    outs: Mapping[str, torch.Tensor],
    schedule: RowSchedule | None,
) -> Plan:
    shape = _Shape(program, given)
    rows, n, parts = shape.rows, shape.n, shape.parts
    plan = Plan([], [(name, (n,), out_dtypes[name]) for name in program.sums], [], shape.contiguous())
    if n == 0:
        return plan
    pitches = [shape.pitch(x) for x in given[: shape.elements]]
    unit = _unit(n, *pitches)
    strides = tuple(pitch // unit for pitch in pitches)
    group, strip, block_n = column_cover(rows, n, _vector(*given[: shape.elements]), schedule.block_rows if schedule else None)
    lanes, segments = ROW_CONTRACT.lanes_for(rows), ROW_CONTRACT.segments(rows)
    chunks = max(1, triton.cdiv(min(rows, ROW_CONTRACT.segment), lanes))
    groups = lanes // group
    blocks_n = triton.cdiv(n, block_n)
    even = rows == segments * chunks * lanes and n % block_n == 0
    tail = (
        rows, n // unit, groups, Formulas(program), unit, even, chunks, lanes, ROW_CONTRACT.segment, group, strip, block_n,
    )  # fmt: skip
    counts = [segments * groups]
    while counts[-1] > 1:
        counts.append(triton.cdiv(counts[-1], _MOST_COLUMNS_COUNT))
    plan.workspace = [count * n for count in counts[:-1] for _ in program.sums]

    def results(call: _Call, level: int) -> tuple[torch.Tensor, ...]:
        if level == len(counts) - 1:
            return tuple(call.outputs.values())
        return call.workspace[level * len(program.sums) : (level + 1) * len(program.sums)]

    def sums(call: _Call) -> tuple[Any, ...]:
        elements, columns, per_row, _ = parts(call)
        return (elements, strides, columns, per_row, call.scalars, results(call, 0), *tail)

    def tree(level: int) -> Launch:
        size = min(_MOST_COLUMNS_COUNT, power_of_two(counts[level]))
        width = min(power_of_two(n), 32)

        def arguments(call: _Call) -> tuple[Any, ...]:
            return (results(call, level), results(call, level + 1), counts[level], n, size, width)

        return Launch(triton_kernels.column_tree, counts[level + 1] * triton.cdiv(n, width), arguments, 4)

    warps = schedule.warps if schedule else 4
    plan.launches.append(Launch(triton_kernels.column_sums, counts[0] * blocks_n, sums, warps))
    plan.launches += [tree(level) for level in range(len(counts) - 1)]
    return plan


def _persistent_programs(schedule: RowSchedule, device: int) -> int:
    """Thread blocks that fill the GPU, 16 warps to a multiprocessor."""
    return multiprocessors(device) * max(1, 16 // schedule.warps)
