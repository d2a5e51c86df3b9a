"""The Triton row kernels: run on a CPU, against the reference model, bit for bit; and compiled for an H100, read as PTX."""

import re
import weakref

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from bi_torch.rows import cuda, triton_kernels, triton_shared_rows
from shared_specs.programs import attention, norm, optimizer, pointwise, reduce, softmax
from shared_specs.programs.catalogue import COLUMN_PROGRAMS, SCALARS
from shared_specs.row_schedule import RowSchedule
from shared_specs.rows import ROW_CONTRACT, ColumnProgram
from tests.arrays import DTYPES, NAMES, assert_same, to_bits
from tests.interpreters.triton import gpu_arithmetic, interpreted
from tests.row_programs import ROW_PROGRAMS, draw_inputs, expected, near_and_far_rows, pow_inputs, uneven_rows

KERNELS = interpreted(triton_kernels)
SHARED = interpreted(triton_shared_rows, KERNELS)
SHARED._await = lambda words, inside: SHARED.tl.load(words, mask=inside, other=0)
TARGET = GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 1)


def planned(program, inputs, out_dtypes, schedule=None, outs=None, scalars=SCALARS):
    """The plan and the arguments of a call, as the CUDA path would make them."""
    make = cuda._columns_plan if isinstance(program, ColumnProgram) else cuda._rows_plan
    given = [inputs[name] for name in cuda._tensor_names(program)]
    plan = make(program, given, out_dtypes, outs or {}, schedule)
    integers = getattr(program, "integers", ())
    return plan, plan.call(
        given, *(tuple(scalars[name] for name in names) for names in (program.scalars, integers)), outs or {}
    )


def run(*args, **options):
    """Launch in the interpreter what the CUDA path would launch.

    The interpreter runs one program after another, so none can wait for the next. Programs that would wait go on with what
    they find, and run again: after each time one more reduction is complete.
    """
    plan, call = planned(*args, **options)
    with gpu_arithmetic():
        for launch in plan.launches:
            module, times = KERNELS, 1
            if launch.kernel is triton_shared_rows.rows_shared:
                module, times = SHARED, 1 + len(args[0].reductions)
            for _ in range(times):
                if call.words is not None:
                    call.words[0] = 0
                getattr(module, launch.kernel.__name__)[(launch.grid,)](*launch.arguments(call), **launch.options)
    return call.outputs


def dtypes_of(program, dtype):
    names = program.sums if isinstance(program, ColumnProgram) else program.outputs
    return dict.fromkeys(names, DTYPES[dtype])


def check(program, rows, n, dtype="float32", schedule=None, *, kind="normal", out_dtype=None, inputs=None):
    inputs = inputs or draw_inputs(program, rows, n, dtype, kind, seed=n)
    out_dtypes = dtypes_of(program, out_dtype or dtype)
    outputs, wanted = run(program, inputs, out_dtypes, schedule), expected(program, inputs, out_dtypes)
    assert set(outputs) == set(wanted)
    for name, value in wanted.items():
        assert_same(outputs[name], value)


by_name = {"ids": lambda program: program.name}
FORMATS = tuple(DTYPES)


@pytest.mark.parametrize("program", ROW_PROGRAMS, **by_name)
def test_every_row_program(program):
    turn = ROW_PROGRAMS.index(program)
    check(program, 3, 100, FORMATS[turn % 3])
    check(program, 1, 1030, FORMATS[(turn + 1) % 3], kind="special")


@pytest.mark.parametrize("program", COLUMN_PROGRAMS, **by_name)
def test_every_column_program(program):
    check(program, 37, 5, "bfloat16")
    check(program, 1100, 3, "float32", kind="special")


# One of each kind of reduction, and of each way in which results of a reduction are used.
VARIED = [softmax.SOFTMAX, norm.layer_norm(True, True), reduce.AMIN, softmax.cross_entropy(True), reduce.SUM]
WIDTHS = [1, 2, 5, 127, 128, 1000, 1024, 1025, 4096, 8192, 8193, 20000]


@pytest.mark.parametrize("n", WIDTHS)
def test_widths(n):
    turn = WIDTHS.index(n)
    check(VARIED[turn % len(VARIED)], 3 if n < 4096 else 1, n, FORMATS[turn % 3])
    check(VARIED[(turn + 1) % len(VARIED)], 2 if n < 4096 else 1, n, FORMATS[(turn + 1) % 3])


@pytest.mark.parametrize(
    ("n", "schedule"),
    [
        (100, RowSchedule(block_rows=4, warps=2)),
        (100, RowSchedule(block_rows=2, warps=8, persistent=True)),
        (3000, RowSchedule(block_rows=4)),
        (3000, RowSchedule(warps=16)),
        (3000, RowSchedule(warps=1, persistent=True)),
        (20000, RowSchedule(warps=2)),
        (20000, RowSchedule(warps=4, blocks_per_row=2)),
        (20000, RowSchedule(warps=8, blocks_per_row=9)),
        (20000, RowSchedule(warps=8, cooperative=True)),
        (9000, RowSchedule(cooperative=True)),
    ],
    ids=repr,
)
def test_schedules(n, schedule):
    for program in (softmax.SOFTMAX, softmax.token_logprobs_backward(True), reduce.AMAX):
        check(program, 5 if n < 8192 else 1, n, "bfloat16", schedule)


@pytest.mark.parametrize("kind", ["wide", "subnormal", "zeros", "bits"])
def test_values(kind):
    for program in (reduce.SUM, reduce.AMAX, reduce.AMIN, norm.COLUMN_SUM):
        check(program, 5, 77, "float32", kind=kind)
    for dtype in FORMATS:
        check(softmax.SOFTMAX, 5, 77, dtype, kind=kind)
        check(pointwise.SILU_MUL, 5, 77, dtype, kind=kind)


def test_rows_of_infinities():
    x = torch.full((6, 9000), -float("inf"))
    x[1:, :8192] = -200.0
    x[2, 8200], x[3, 8200], x[4, 5], x[5, 10] = 300.0, float("inf"), float("inf"), float("nan")
    check(softmax.SOFTMAX, 6, 9000, inputs={"x": x})
    check(softmax.LOGSUMEXP, 6, 9000, schedule=RowSchedule(blocks_per_row=2), inputs={"x": x})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("program", [softmax.token_logprobs(False), softmax.SOFTMAX], **by_name)
def test_near_and_far_from_the_maximum(program, dtype):
    """Rows of one segment and of two, of which a warp takes the shorter or the longer way to its exponentials."""
    for n in (1030, 8200):
        inputs = {"x": near_and_far_rows(n).to(dtype)} | dict.fromkeys(program.ids, torch.arange(10) * 3)
        check(program, 10, n, NAMES[dtype], inputs=inputs, schedule=RowSchedule(cooperative=n > 8192))


HELD_OR_NOT = [RowSchedule(warps=16), RowSchedule(cooperative=True), RowSchedule(blocks_per_row=3)]


@pytest.mark.parametrize("schedule", HELD_OR_NOT, ids=repr)
def test_segments_of_different_maxima(schedule):
    """Terms stay in registers, or are computed again with the maximum of their segment."""
    inputs = {"x": uneven_rows(9000)[1:].bfloat16(), "length": torch.tensor([9000, 8300, 9000, 5, 9000])}
    check(attention.attention_softmax(True), 5, 9000, schedule=schedule, inputs=inputs)


def test_special_values_of_pow():
    inputs = pow_inputs()
    check(pointwise.POW, 1, inputs["x1"].shape[1], inputs=inputs)


@pytest.mark.parametrize("most", [1, 2])
def test_rows_of_very_many_segments(monkeypatch, most):
    monkeypatch.setattr(cuda, "_MOST_COUNT", most)
    monkeypatch.setattr(cuda, "_COMBINED", 2)
    for program in (softmax.SOFTMAX, softmax.LOG_SOFTMAX, reduce.AMAX, reduce.VAR):
        check(program, 2, 5 * 8192 - 100, "bfloat16", RowSchedule(blocks_per_row=2, warps=8))


@pytest.mark.parametrize(
    ("rows", "n", "group"), [(1, 130, 4), (8, 70, 1), (1000, 8, 64), (1024, 3, 1024), (2100, 2, 128), (8300, 1, 256)]
)
def test_sums_over_rows(rows, n, group, monkeypatch):
    monkeypatch.setattr(cuda, "_MOST_COLUMNS_COUNT", 4)
    check(norm.layer_norm_parameters(True, True), rows, n, "bfloat16", RowSchedule(block_rows=group))


@pytest.mark.parametrize(("rows", "n"), [(0, 0), (0, 5), (3, 0)])
def test_nothing(rows, n):
    for program in (reduce.SUM, softmax.SOFTMAX, norm.rms_norm(True), pointwise.EXP, norm.COLUMN_SUM):
        check(program, rows, n)


def test_output_dtypes():
    for program in (softmax.SOFTMAX, pointwise.GELU):
        check(program, 3, 200, "bfloat16", out_dtype="float32")
        check(program, 3, 200, "float32", out_dtype="float16")
    inputs = draw_inputs(reduce.MEAN, 3, 200, "bfloat16")
    wanted = expected(reduce.MEAN, inputs, {"y": torch.bfloat16})
    assert_same(run(reduce.MEAN, inputs, {"y": torch.bfloat16})["y"], wanted["y"])


def test_row_strides():
    wide = draw_inputs(reduce.SUM, 6, 300, "bfloat16")["x"]
    weight, bias = wide[0, :200], wide[1, ::2][:100].repeat(2)
    for x in (wide[:, :200], wide[:, 3:203], wide[::2, :200], wide[:1, :200].expand(4, 200)):
        check(norm.layer_norm(True, True), *x.shape, "bfloat16", inputs={"x": x, "weight": weight, "bias": bias})
        check(pointwise.EXP, *x.shape, "bfloat16", inputs={"x": x})
    check(reduce.SUM, 6, 1, "bfloat16", inputs={"x": wide[:, 7:8]})
    check(norm.COLUMN_SUM, 6, 200, "bfloat16", inputs={"x": wide[:, 3:203]})
    every_second = {"like": wide, "g": torch.arange(12.0)[::2]}
    check(reduce.SPREAD, 6, 300, "bfloat16", inputs=every_second)


def test_outputs_may_be_inputs():
    inputs = draw_inputs(optimizer.ADAMW, 3, 200, "float32")
    out_dtypes = dtypes_of(optimizer.ADAMW, "float32")
    wanted = expected(optimizer.ADAMW, inputs, out_dtypes)
    outs = {name: inputs[name] for name in ("p", "m", "v")}
    run(optimizer.ADAMW, inputs, out_dtypes, outs=outs)
    for name, value in outs.items():
        assert_same(value, wanted[name])


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_ids_outside_the_row(ids):
    x = draw_inputs(reduce.SUM, 4, 50, "float32")["x"]
    given = torch.tensor([49, 50, -1, 7] if ids == torch.int32 else [49, 2**32, -(2**32), 7], dtype=ids)
    y = run(softmax.token_logprobs(False), {"x": x, "id": given}, {})["y"]
    assert y.isnan().tolist() == [False, True, True, False]
    assert to_bits(y)[1] == to_bits(y)[2] == 0x7FFFFFFF


@pytest.mark.parametrize(
    ("program", "n", "schedule"),
    [
        (reduce.SUM, 100, RowSchedule(blocks_per_row=2)),
        (reduce.SUM, 9000, RowSchedule(block_rows=2)),
        (reduce.SUM, 200 * 8192, RowSchedule(cooperative=True)),
        (reduce.SUM, 9000, RowSchedule(warps=12)),
    ],
)
def test_schedules_that_no_row_allows_raise(program, n, schedule):
    with pytest.raises(ValueError, match=program.name):
        run(program, draw_inputs(program, 4, n, "float32"), {}, schedule)


def test_inputs_of_other_shapes_raise():
    x = torch.zeros(4, 6)
    for inputs in ({"x": x.t()}, {"x": x, "weight": x[0, :5]}):
        program = norm.rms_norm("weight" in inputs)
        with pytest.raises(ValueError, match="rms_norm"):
            run(program, inputs, {"y": torch.float32})


def compiled(program, rows, n, dtype, schedule=None):
    """The launches of a call on aligned tensors, compiled for an H100."""
    inputs = {name: x.to("meta") for name, x in draw_inputs(program, 1, n, dtype).items()}
    for name in (*program.elements, *program.rows, *getattr(program, "ids", ())):
        inputs[name] = inputs[name].expand(rows, *inputs[name].shape[1:]).contiguous()
    plan, call = planned(program, inputs, dtypes_of(program, dtype), schedule)
    for launch in plan.launches:
        yield for_an_h100(launch, call)


INEXACT = r"\.ftz|\b(add|sub|mul)\.f32|\bdiv\.(full|approx)|\b(sqrt|rcp|ex2|lg2)\.approx|\bmad\.\S*f32"
"""Instructions that flush, or leave roundings to the assembler."""


def for_an_h100(launch, call):
    """What a launch runs on an H100."""
    backend, kernel = make_backend(TARGET), launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*launch.arguments(call), **launch.options)
    options, signature, constants, attributes = kernel._pack_args(backend, launch.options, bound, specialization, options)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=options.__dict__)


COMPILED = [
    (softmax.SOFTMAX, 65536, 128, "bfloat16", None),
    (softmax.SOFTMAX, 4096, 16384, "bfloat16", None),
    (softmax.SOFTMAX, 4, 151936, "float32", None),
    (softmax.SOFTMAX, 4, 151936, "bfloat16", RowSchedule(warps=8, blocks_per_row=4)),
    (norm.layer_norm(True, True), 8192, 8192, "float32", None),
    (norm.layer_norm_backward(True), 65536, 512, "float32", None),
    (norm.rms_norm_backward(True), 16384, 4096, "bfloat16", RowSchedule(block_rows=2)),
    (optimizer.ADAMW, 1, 1 << 20, "bfloat16", None),
    (pointwise.POW, 1, 1 << 20, "float32", None),
    (norm.layer_norm_parameters(True, True), 16384, 4096, "float32", None),
]


@pytest.mark.parametrize(("program", "rows", "n", "dtype", "schedule"), COMPILED, ids=lambda x: getattr(x, "name", str(x)))
def test_compiled_for_an_h100(program, rows, n, dtype, schedule):
    """Every operation is rounded once, nothing is contracted, and inputs are read sixteen bytes at a time."""
    for kernel in compiled(program, rows, n, dtype, schedule):
        ptx = kernel.asm["ptx"]
        assert not re.search(INEXACT, ptx)
        if kernel.metadata.name != "column_tree":
            assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
            assert not re.search(r"ld\.global\S*(hint\.b32|\.v2\.b32|\.b16)", ptx)


@pytest.mark.parametrize("n", [1, 2, 8, 16])
def test_narrow_rows_compile(n):
    """Triton turns a stride of 1, in whatever unit, into a constant."""
    assert list(compiled(softmax.SOFTMAX, 9, n, "float32"))
    assert list(compiled(norm.COLUMN_SUM, 9, n, "float32"))


def test_programs_of_a_row_meet():
    """What a program leaves is stored and awaited as words, each of which is read and written as a whole."""
    (kernel,) = compiled(softmax.SOFTMAX, 4, 147456, "float32", RowSchedule(1, 8, cooperative=True))
    ptx = kernel.asm["ptx"]
    assert "atom.global.gpu.relaxed.add" in ptx
    assert ptx.count("atom.global.gpu.relaxed.exch.b64") == 2
    assert ptx.count("ld.volatile.global.b64") == 4
    assert ptx.rindex("exch.b64") < ptx.index("ld.volatile.global.b64")


def test_only_the_program_asks_for_fma():
    (kernel,) = compiled(reduce.VAR, 64, 4096, "float32", RowSchedule())
    assert not re.search(r"\bfma\.", kernel.asm["ptx"])
    assert re.search(r"\bmul\.rn\.f32", kernel.asm["ptx"])
    (kernel,) = compiled(softmax.SOFTMAX, 64, 4096, "float32", RowSchedule())
    assert re.search(r"\bfma\.rn\.f32", kernel.asm["ptx"])


@pytest.mark.parametrize(("rows", "n", "held"), [(16_384, 4096, 4096), (4096, 16_384, 16_384), (2048, 147_456, 8192)])
def test_softmax_computes_an_exponential_once(rows, n, held):
    """It takes seven fma; where a block has one segment, there are two branches."""
    (kernel,) = compiled(softmax.SOFTMAX, rows, n, "bfloat16")
    values = held // (32 * kernel.metadata.num_warps)
    branches = 2 if held <= ROW_CONTRACT.segment else 1
    assert 7 * branches * values <= kernel.asm["ptx"].count("fma.rn.f32") < (7 * branches + 1) * values


@pytest.mark.parametrize("n", [100, 20_000, 2_000_000])
def test_a_plan_keeps_no_tensor(n, monkeypatch):
    """It outlives the call that it was made for."""
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)
    for program in (softmax.SOFTMAX, norm.COLUMN_SUM):
        given = [torch.empty(2, n) for _ in program.elements]
        alive = [weakref.ref(x) for x in given]
        column = isinstance(program, ColumnProgram)
        dtypes = dict.fromkeys(program.sums if column else program.outputs, torch.float32)
        plan = (cuda._columns_plan if column else cuda._rows_plan)(program, given, dtypes, {}, None)
        del given
        assert plan.launches
        assert not any(x() is not None for x in alive)
