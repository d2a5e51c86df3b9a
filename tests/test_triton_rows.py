"""The Triton row kernels: on a CPU, against the reference model, bit for bit; and compiled for an H100, read as PTX."""

import pytest

from bi_torch.rows import cuda, triton_kernels
from shared_specs.row_schedule import RowSchedule
from shared_specs.rows import ColumnProgram
from tests.arrays import DTYPES, assert_same
from tests.interpreters.triton import gpu_arithmetic, interpreted
from tests.row_programs import COLUMN_PROGRAMS, ROW_PROGRAMS, SCALARS, draw_inputs, expected

KERNELS = interpreted(triton_kernels)
MULTIPROCESSORS = 1


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: MULTIPROCESSORS)


def planned(program, inputs, out_dtypes, schedule=None, outs=None, scalars=SCALARS):
    """The plan and the arguments of a call, as the CUDA path would make them."""
    make = cuda._columns_plan if isinstance(program, ColumnProgram) else cuda._rows_plan
    given = [inputs[name] for name in cuda._tensor_names(program)]
    plan = make(program, given, out_dtypes, outs or {}, schedule)
    return plan, cuda._call(program, plan, given, scalars, outs or {})


def run(*args, **options):
    """Launch in the interpreter what the CUDA path would launch."""
    plan, call = planned(*args, **options)
    with gpu_arithmetic():
        for launch in plan.launches:
            getattr(KERNELS, launch.kernel.__name__)[(launch.grid,)](*launch.arguments(call), **launch.options)
    return call.outputs


def check(program, rows, n, dtype="float32", schedule=None, *, kind="normal", out_dtype=None, seed=0):
    inputs = draw_inputs(program, rows, n, dtype, kind, seed)
    names = program.sums if isinstance(program, ColumnProgram) else program.outputs
    out_dtypes = dict.fromkeys(names, DTYPES[out_dtype or dtype])
    outputs, wanted = run(program, inputs, out_dtypes, schedule), expected(program, inputs, out_dtypes)
    assert set(outputs) == set(wanted)
    for name, value in wanted.items():
        assert_same(outputs[name], value)


by_name = {"ids": lambda program: program.name}
REDUCING = [program for program in ROW_PROGRAMS if program.reductions]


@pytest.mark.parametrize("program", ROW_PROGRAMS, **by_name)
def test_every_row_program(program):
    check(program, 3, 100, "bfloat16")
    check(program, 1, 1030, "float32", kind="special")
    check(program, 2, 8192 + 40, "float16", RowSchedule(1, 4, blocks_per_row=2))


@pytest.mark.parametrize("program", COLUMN_PROGRAMS, **by_name)
def test_every_column_program(program):
    check(program, 37, 5, "bfloat16")
    check(program, 1100, 3, "float32", kind="special")
