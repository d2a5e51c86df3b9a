"""The Mosaic row and column kernels: on a CPU, against the reference model, bit for bit."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bi_jax.rows import mosaic, mosaic_kernel, warpgroup
from shared_specs import scalar, sum_exp
from shared_specs.formats import float_format
from shared_specs.inputs import KINDS
from shared_specs.programs import attention, norm, optimizer, pointwise, reduce, softmax
from shared_specs.programs.catalogue import COLUMN_PROGRAMS, SCALARS
from shared_specs.reference import rows as reference
from shared_specs.reference.arithmetic import NumpyArithmetic
from shared_specs.row_schedule import RowSchedule
from shared_specs.rows import ColumnProgram
from tests.arrays import DTYPES, NAMES, to_bits
from tests.interpreters.mosaic import interpreted
from tests.row_programs import ROW_PROGRAMS, draw_inputs, expected, near_and_far_rows, pow_inputs, uneven_rows

by_name = {"ids": lambda program: program.name}
BLOCKS_SHARE_ROWS = RowSchedule(warps=4, blocks_per_row=2)


def to_jax(x):
    if x.dtype not in NAMES:
        return jnp.asarray(x.numpy().astype(np.int32))
    return jnp.asarray(to_bits(x).view(jnp.dtype(NAMES[x.dtype])))


def check(program, rows, n, dtype="float32", schedule=None, *, kind="normal", out_dtype=None, seed=0, inputs=None):
    inputs = inputs or draw_inputs(program, rows, n, dtype, kind, seed)
    columns = isinstance(program, ColumnProgram)
    names = program.sums if columns else program.outputs
    fmt = float_format(out_dtype or dtype)
    given = {name: SCALARS[name] for name in (*program.scalars, *getattr(program, "integers", ()))}

    def run(inputs, scalars):
        engine = mosaic.run_columns if columns else mosaic.run_rows
        return engine(program, inputs, scalars, dict.fromkeys(names, fmt.name), schedule=schedule)

    with interpreted():
        outputs = jax.jit(run)({name: to_jax(x) for name, x in inputs.items()}, given)
        outputs = {name: np.asarray(x) for name, x in outputs.items()}
    wanted = expected(program, inputs, dict.fromkeys(names, DTYPES[fmt.name]))
    assert set(outputs) == set(wanted)
    for name, value in wanted.items():
        bits = to_bits(value)
        np.testing.assert_array_equal(outputs[name].view(bits.dtype), bits, err_msg=f"{program.name}: {name}")


@pytest.mark.parametrize("program", ROW_PROGRAMS, **by_name)
def test_every_row_program(program):
    check(program, 3, 100, "bfloat16", kind="special")


SEVERAL_REDUCTIONS = [
    reduce.VAR,
    softmax.cross_entropy(True),
    softmax.token_logprobs(True),
    norm.layer_norm_backward(True),
    norm.fused_add_rms_norm(True, "bfloat16"),
]


@pytest.mark.parametrize("program", SEVERAL_REDUCTIONS, **by_name)
def test_reductions_over_several_blocks(program):
    check(program, 2, 8193, "float32", BLOCKS_SHARE_ROWS, out_dtype="float16")


@pytest.mark.parametrize("program", SEVERAL_REDUCTIONS, **by_name)
def test_reductions_over_warpgroups_that_wait_for_one_another(program):
    """The interpreter runs one block after the other, so the first takes all segments: no more of a row than its warpgroups."""
    check(program, 2, 24577, "float32", RowSchedule(warps=16, cooperative=True), out_dtype="float16")


def test_waiting_is_ordered():
    """The instructions by which blocks that run at the same time hand on their results."""
    text = lowered(softmax.SOFTMAX, 64, 151_936, "bfloat16")
    assert "atom.relaxed.gpu.global.inc.u32" in text
    assert text.index("atom.relaxed.gpu.global.exch.b64") < text.index("ld.relaxed.gpu.global.b64")
    assert accesses(text) == {f"{access}{warpgroup.ONCE}.v4.b32" for access in ("ld.global.nc", "st.global")}
    assert "output_operand_aliases" in text


LENGTHS = (1, 5, 8, 127, 128, 257, 1000, 1024, 1025, 4096, 8192, 8193)


@pytest.mark.parametrize(("n", "dtype"), list(zip(LENGTHS, itertools.cycle(DTYPES), strict=False)))
def test_every_length(n, dtype):
    check(norm.rms_norm(True), 3, n, dtype, RowSchedule(warps=16) if n > mosaic_kernel.SEGMENT else None)


SCHEDULES = [
    (130, 5, RowSchedule(block_rows=256, warps=4)),
    (9, 256, RowSchedule(block_rows=8, warps=4, persistent=True)),
    (5, 1000, RowSchedule(block_rows=4, warps=8)),
    (3, 16384, RowSchedule(warps=8)),
    (2, 20000, RowSchedule(warps=16)),
    (3, 10000, RowSchedule(block_rows=2, warps=16)),
    (2, 20000, RowSchedule(warps=4, persistent=True)),
    (1, 41000, RowSchedule(warps=8, blocks_per_row=2)),
    (3, 10000, RowSchedule(warps=16, cooperative=True)),
    (4, 9000, RowSchedule(warps=20, cooperative=True)),
    (4, 9000, RowSchedule(warps=12, cooperative=True)),
    (7, 5000, RowSchedule(warps=20)),
    (5, 16384, RowSchedule(warps=8, cooperative=True)),
    (3, 20000, RowSchedule(block_rows=2, warps=16, cooperative=True)),
]


@pytest.mark.parametrize(("rows", "n", "schedule"), SCHEDULES, ids=repr)
def test_schedules_share_bits(rows, n, schedule, monkeypatch):
    monkeypatch.setattr(mosaic, "SMS", 1)
    check(softmax.SOFTMAX, rows, n, "bfloat16", schedule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("program", [softmax.token_logprobs(False), softmax.SOFTMAX], **by_name)
def test_near_and_far_from_the_maximum(program, dtype):
    """Rows of one segment and of two, of which a warp takes the shorter or the longer way to its exponentials."""
    for n in (100, 1030, 8200):
        inputs = {"x": near_and_far_rows(n).to(dtype)} | dict.fromkeys(program.ids, torch.arange(10) * 3)
        check(program, 10, n, NAMES[dtype], inputs=inputs, schedule=RowSchedule(warps=4))


@pytest.mark.parametrize(("rows", "n", "block_rows"), [(70, 100, 32), (64, 16, 128), (9, 1000, 4)])
def test_threads_of_short_rows_share_out_their_numbers(rows, n, block_rows):
    check(softmax.token_logprobs(True), rows, n, "bfloat16", RowSchedule(block_rows=block_rows, warps=4))
    check(reduce.VAR, rows, n, "float32", RowSchedule(block_rows=block_rows, warps=4))


HELD_OR_NOT = [
    RowSchedule(warps=16),
    RowSchedule(warps=16, cooperative=True),
    RowSchedule(warps=4),
    RowSchedule(warps=4, blocks_per_row=2),
    RowSchedule(warps=32, cooperative=True),
]


@pytest.mark.parametrize("schedule", HELD_OR_NOT, ids=repr)
def test_segments_of_different_maxima(schedule):
    """Terms stay in registers, or are computed again with the maximum of their segment."""
    inputs = {"x": uneven_rows(20_000), "length": torch.tensor([20_000, 16_385, 9000, 20_000, 5, 20_000])}
    check(attention.attention_softmax(True), 6, 20_000, "float32", schedule, inputs=inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_value(kind):
    check(softmax.LOG_SOFTMAX, 3, 1030, "bfloat16", kind=kind)
    check(reduce.EXTREME_BACKWARD, 3, 40, "float16", kind=kind, out_dtype="float32")


def test_special_values_of_pow():
    inputs = pow_inputs()
    check(pointwise.POW, 1, inputs["x1"].shape[1], inputs=inputs)


@pytest.mark.parametrize("size", [1, 1023, 1024, 5000])
def test_elementwise_operations_of_any_size(size, monkeypatch):
    monkeypatch.setattr(mosaic, "SMS", 1)
    check(pointwise.SILU_MUL_BACKWARD, 1, size, "bfloat16")
    check(optimizer.sgd(True, True, False), 1, size, "float32", RowSchedule(block_rows=2, warps=8, persistent=True))


@pytest.mark.parametrize("program", [reduce.SUM, reduce.AMIN, softmax.LOGSUMEXP], **by_name)
def test_more_segments_than_lanes(program):
    """The tree over 2500 segments, whose results are given."""
    segments = 2500
    plan = mosaic.row_plan(program, 2, segments * mosaic_kernel.SEGMENT, {"x": "float32"}, {}, BLOCKS_SHARE_ROWS)
    count = mosaic_kernel.partial_count(plan.formulas.stages[0])
    drawn = [np.random.default_rng(i).random((2, segments), np.float32) for i in range(count)]
    names = [f"0.{i}" for i in range(count)]
    run = mosaic_kernel.kernel(plan, range(1, 2), ("x", *names), {"y": (2, "float32")})
    with interpreted():
        (y,) = jax.jit(run)(jnp.zeros(1), *(jnp.asarray(x.reshape(-1)) for x in drawn))
    f = NumpyArithmetic()
    if program is softmax.LOGSUMEXP:
        maximum = drawn[0].max(axis=1, keepdims=True)
        total = reference.tree(sum_exp.rescaled(f, sum_exp.SumExp(*drawn), maximum))
        wanted = f.add(scalar.log(f, total), maximum[:, 0])
    else:
        wanted = reference.tree(drawn[0]) if program is reduce.SUM else drawn[0].min(axis=1)
    np.testing.assert_array_equal(np.asarray(y), wanted)


@pytest.mark.parametrize("program", COLUMN_PROGRAMS, **by_name)
def test_every_column_program(program):
    check(program, 37, 5, "bfloat16", kind="special")
    check(program, 1026, 40, "float32", out_dtype="float16")


@pytest.mark.parametrize(
    ("rows", "schedule"), [(1, None), (32, None), (33, RowSchedule(32)), (1024, RowSchedule(1024)), (8200, RowSchedule(1024))]
)
def test_every_number_of_rows(rows, schedule):
    check(norm.COLUMN_SUM, rows, 9, "bfloat16", schedule)


@pytest.mark.parametrize("kind", ["cancel", "subnormal", "zeros", "bits"])
def test_kinds_of_value_over_rows(kind):
    check(norm.layer_norm_parameters(True, True), 70, 300, "float16", kind=kind)


ILLEGAL = [
    (128, RowSchedule(warps=2), "4 warps each"),
    (20000, RowSchedule(block_rows=2, warps=4), "each of 2 rows"),
    (2**31, None, "must not exceed"),
    (8192 * 1025, RowSchedule(warps=4), "blocks_per_row > 1"),
    (8192 * 33, RowSchedule(cooperative=True), "up to 32 segments"),
]


@pytest.mark.parametrize(("n", "schedule", "message"), ILLEGAL)
def test_illegal_schedules_raise(n, schedule, message):
    with pytest.raises(ValueError, match=message):
        mosaic.row_plan(reduce.SUM, 4, n, {"x": "bfloat16"}, {}, schedule)


def test_workspace():
    """None but the results of segments, where blocks share a row."""

    def needed(program, rows, n, schedule=None):
        dtypes = dict.fromkeys((*program.elements, *program.columns), "bfloat16")
        plan = mosaic.row_plan(program, rows, n, dtypes, dict.fromkeys(program.outputs, "bfloat16"), schedule)
        return mosaic.row_workspace_bytes(plan)

    assert needed(softmax.SOFTMAX, 4096, 8192) == needed(reduce.SUM, 4096, 16_384) == 0
    assert needed(softmax.SOFTMAX, 3, 151_936) == 8 * (3 * 19 * 2 + 1)
    assert needed(norm.layer_norm(True, True), 3, 16_384, BLOCKS_SHARE_ROWS) == 4 * 3 * 2 * 2
    passes = mosaic.column_passes(norm.COLUMN_SUM, 16_384, 4096, {"x": "bfloat16"}, {"y": "bfloat16"})
    assert mosaic.column_workspace_bytes(passes) == 4 * 64 * 4096


@pytest.mark.parametrize(("rows", "n"), [(16_384, 4096), (4096, 16_384), (2048, 151_936)])
def test_softmax_computes_an_exponential_once(rows, n):
    """The term of the sum is what stays in registers until the outputs."""
    plan = mosaic.row_plan(softmax.SOFTMAX, rows, n, {"x": "bfloat16"}, {"y": "bfloat16"})
    (stage,) = plan.formulas.stages
    assert plan.keeps
    assert [step.kept for step in stage.steps] == [(), (stage.steps[1].value,)]


def lowered(program, rows, n, dtype):
    """The inline PTX of a program for an H100, as MLIR holds it: each distinct piece of text once."""
    columns = isinstance(program, ColumnProgram)
    shapes = dict.fromkeys(program.elements, (rows, n)) | dict.fromkeys(program.columns, (n,))
    inputs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    inputs |= {name: jax.ShapeDtypeStruct((rows,), "float32") for name in program.rows}
    inputs |= {name: jax.ShapeDtypeStruct((rows,), "int32") for name in getattr(program, "ids", ())}
    out_dtypes = dict.fromkeys(program.sums if columns else program.outputs, dtype)
    engine = mosaic.run_columns if columns else mosaic.run_rows
    run = jax.jit(lambda inputs: engine(program, inputs, SCALARS, out_dtypes))
    return run.trace(inputs).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("program", [*ROW_PROGRAMS, *COLUMN_PROGRAMS], **by_name)
def test_every_operation_is_rounded_once(program):
    text = lowered(program, 64, 128, "bfloat16")
    instructions = re.findall(r"(?:add|sub|mul|fma|div|sqrt|max|min|cvt)\.[a-zA-Z0-9.]+", text)
    assert instructions
    for instruction in instructions:
        name, _, rest = instruction.partition(".")
        if rest.endswith(("s32", "u32")) and name != "cvt":
            continue
        assert "ftz" not in rest, instruction
        if name == "cvt" and rest.startswith("f32."):
            assert rest in ("f32.bf16", "f32.f16"), instruction  # exact
        elif name in ("max", "min"):
            assert rest in ("NaN.f32", "NaN.bf16x2", "NaN.f16x2"), instruction
        else:
            assert rest.startswith(("rn.", "rzi.s32")), instruction


def accesses(text):
    return set(re.findall(r"(?:ld|st)\.global[\w:.]*", text))


def test_memory_is_read_and_written_sixteen_bytes_at_a_time():
    wide = {"ld.global.nc.v4.b32", "st.global.v4.b32"}
    # Columns are needed again, by other rows.
    assert accesses(lowered(norm.layer_norm(True, True), 2048, 147_456, "bfloat16")) > {"ld.global.nc.v4.b32"}
    for program, n in itertools.product((softmax.SOFTMAX, pointwise.SILU), (128, 4096, 14_336)):
        assert accesses(lowered(program, 256, n, "bfloat16").replace(warpgroup.ONCE, "")) == wide
    assert accesses(lowered(norm.COLUMN_SUM, 16_384, 4096, "bfloat16")) == wide
    assert accesses(lowered(softmax.SOFTMAX, 256, 4098, "bfloat16")) == {"ld.global.nc.b32", "st.global.b32"}
    assert accesses(lowered(softmax.SOFTMAX, 256, 4097, "bfloat16")) == {"ld.global.nc.b16", "st.global.b16"}
