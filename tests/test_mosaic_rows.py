"""The Mosaic row and column kernels: on a CPU, against the reference model, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bi_jax.rows import mosaic, mosaic_kernel
from shared_specs.formats import float_format
from shared_specs.inputs import KINDS
from shared_specs.programs import norm, optimizer, pointwise, reduce, softmax
from shared_specs.row_schedule import RowSchedule
from shared_specs.rows import ColumnProgram
from tests.arrays import DTYPES, NAMES, to_bits
from tests.interpreters.mosaic import interpreted
from tests.row_programs import COLUMN_PROGRAMS, ROW_PROGRAMS, SCALARS, draw_inputs, expected

by_name = {"ids": lambda program: program.name}
BLOCKS_SHARE_ROWS = RowSchedule(warps=4, blocks_per_row=2)


def to_jax(x):
    if x.dtype not in NAMES:
        return jnp.asarray(x.numpy().astype(np.int32))
    return jnp.asarray(to_bits(x).view(jnp.dtype(NAMES[x.dtype])))


def check(program, rows, n, dtype="float32", schedule=None, *, kind="normal", out_dtype=None, seed=0):
    inputs = draw_inputs(program, rows, n, dtype, kind, seed)
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


@pytest.mark.parametrize("program", [p for p in ROW_PROGRAMS if p.reductions], **by_name)
def test_every_reduction_over_several_blocks(program):
    check(program, 2, 8193, "float32", BLOCKS_SHARE_ROWS, out_dtype="float16")


@pytest.mark.parametrize("n", [1, 5, 8, 127, 128, 257, 1000, 1024, 1025, 4096, 8192, 8193])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_length(n, dtype):
    check(norm.rms_norm(True), 3, n, dtype)


SCHEDULES = [
    (4, 5, RowSchedule(block_rows=4, warps=4)),
    (700, 5, RowSchedule(block_rows=512, warps=8)),
    (9, 256, RowSchedule(block_rows=8, warps=4, persistent=True)),
    (5, 1000, RowSchedule(block_rows=4, warps=8)),
    (3, 16384, RowSchedule(warps=8)),
    (3, 20000, RowSchedule(warps=16)),
    (3, 20000, RowSchedule(block_rows=2, warps=16)),
    (3, 20000, RowSchedule(warps=4, persistent=True)),
    (2, 20000, RowSchedule(warps=8, blocks_per_row=2)),
    (2, 41000, RowSchedule(warps=4, blocks_per_row=3, persistent=True)),
]


@pytest.mark.parametrize(("rows", "n", "schedule"), SCHEDULES, ids=repr)
def test_schedules_share_bits(rows, n, schedule, monkeypatch):
    monkeypatch.setattr(mosaic, "SMS", 1)
    for program in (softmax.SOFTMAX, norm.layer_norm(True, True)):
        check(program, rows, n, "bfloat16", schedule)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_value(kind, dtype):
    check(softmax.LOG_SOFTMAX, 3, 1030, dtype, kind=kind)
    check(reduce.EXTREME_BACKWARD, 3, 40, dtype, kind=kind, out_dtype="float32")


@pytest.mark.parametrize("size", [1, 1023, 1024, 5000])
def test_elementwise_operations_of_any_size(size, monkeypatch):
    monkeypatch.setattr(mosaic, "SMS", 1)
    check(pointwise.SILU_MUL_BACKWARD, 1, size, "bfloat16")
    check(optimizer.sgd(True, True, False), 1, size, "float32", RowSchedule(block_rows=2, warps=8, persistent=True))


def test_more_segments_than_lanes(monkeypatch):
    """Segments as short as lanes, of which there are more than 1024."""
    contract = type(mosaic.ROW_CONTRACT)(segment=1024)
    for module in (mosaic, mosaic_kernel):
        monkeypatch.setattr(module, "ROW_CONTRACT", contract)
        monkeypatch.setattr(module, "SEGMENT", 1024)
    monkeypatch.setattr("tests.row_programs.reference.ROW_CONTRACT", contract)


@pytest.mark.parametrize("program", COLUMN_PROGRAMS, **by_name)
def test_every_column_program(program):
    check(program, 37, 5, "bfloat16", kind="special")
    check(program, 1100, 40, "float32", out_dtype="float16")


@pytest.mark.parametrize("rows", [1, 32, 33, 1024, 8192, 9300])
@pytest.mark.parametrize("schedule", [None, RowSchedule(block_rows=1024)])
def test_every_number_of_rows(rows, schedule):
    check(norm.COLUMN_SUM, rows, 9, "bfloat16", schedule)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_value_over_rows(kind):
    check(norm.layer_norm_parameters(True, True), 70, 300, "float16", kind=kind)
