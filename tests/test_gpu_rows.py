"""Row operations on a GPU: Triton == Pallas == the reference model == every schedule, bit for bit.

Inputs are drawn by PyTorch and shared with JAX; outputs are compared on the device, as integers. Most of the time goes into
compilers, so cases run on threads.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import jax
import numpy as np
import pytest
import torch

import bi_jax
import bi_torch
from bi_bridge import to_jax
from bi_bridge import to_torch as from_jax
from bi_jax.rows import mosaic, primitive
from bi_torch.rows import cuda
from shared_specs import scalar
from shared_specs.formats import FORMATS, float_format
from shared_specs.programs import pointwise
from shared_specs.programs.catalogue import COLUMN_PROGRAMS, ROW_PROGRAMS
from shared_specs.reference.arithmetic import NumpyArithmetic
from shared_specs.row_schedule import RowSchedule
from shared_specs.rows import ColumnProgram
from shared_specs.verification.rows import RowCase
from tests.arrays import DTYPES, NAMES, assert_same, draw, integers, to_torch
from tests.row_calls import ROW_CALLS
from tests.test_frameworks_rows import assert_same as same_in_jax
from tests.test_frameworks_rows import call_in, leaves, wanted_gradients, with_gradients
from tests.test_frameworks_rows import to_jax as bits_to_jax
from tests.threads import on_threads

pytestmark = pytest.mark.gpu

dtypes = pytest.mark.parametrize("dtype", FORMATS)


def drawn(case: RowCase) -> dict[str, torch.Tensor]:
    """The inputs of a case on the GPU."""
    program = case.spec()
    inputs = {}
    for name, bits in case.inputs().items():
        fmt = float_format("float32" if name in program.rows else case.dtype)
        inputs[name] = (torch.from_numpy(bits) if bits.dtype == np.int32 else to_torch(bits, fmt)).cuda()
    return inputs


def triton(case: RowCase, inputs, schedule=None):
    program, out_dtypes = case.spec(), {name: DTYPES[dtype] for name, dtype in case.out_dtypes().items()}
    run = cuda.run_columns if isinstance(program, ColumnProgram) else cuda.run_rows
    return run(program, inputs, case.scalars(), out_dtypes, schedule=schedule)


def pallas(case: RowCase, inputs, schedule=None):
    program, arrays = case.spec(), {name: to_jax(x) for name, x in inputs.items()}
    columns = isinstance(program, ColumnProgram)
    if schedule is None:
        execute = primitive.run_columns if columns else primitive.run_rows
    else:
        run = mosaic.run_columns if columns else mosaic.run_rows
        execute = lambda *args: run(*args, schedule=schedule)  # noqa: E731
    outputs = jax.jit(lambda arrays: execute(program, arrays, case.scalars(), case.out_dtypes()))(arrays)
    jax.block_until_ready(outputs)
    return {name: from_jax(x) for name, x in outputs.items()}


def assert_equal_outputs(actual, expected):
    assert set(actual) == set(expected)
    for name in expected:
        assert_same(actual[name], expected[name])


@pytest.mark.parametrize("family", [*ROW_PROGRAMS, "column sums"])
def test_every_program_gives_the_bits_of_the_model(family):
    programs = COLUMN_PROGRAMS if family == "column sums" else ROW_PROGRAMS[family]

    def check(name, dtype, rows, columns):
        case = RowCase(name, dtype, rows, columns, seed=rows + columns)
        inputs, bits = drawn(case), case.inputs()
        expected = {k: to_torch(v, float_format(case.out_dtypes()[k])).cuda() for k, v in case.expected(bits).items()}
        assert_equal_outputs(triton(case, inputs), expected)
        assert_equal_outputs(pallas(case, inputs), expected)

    shapes = [(3, 8193), (33, 1000), (5, 128)] if family != "column sums" else [(8200, 40), (1100, 264), (7, 33)]
    names = [program.name for program in programs if not program.name.endswith("]") or program.name.endswith("[bfloat16]")]
    on_threads(lambda case: check(*case), [(name, tuple(FORMATS)[(i + j) % 3 if "]" not in name else 0], *shape)
                       for i, name in enumerate(names) for j, shape in enumerate(shapes)])  # fmt: skip


@dtypes
def test_frameworks_agree_on_large_rows(dtype):
    def check(program, rows, columns):
        case = RowCase(program, dtype, rows, columns, seed=0)
        torch.manual_seed(rows + columns)
        inputs = {name: torch.randn(rows, columns, device="cuda").to(DTYPES[dtype]) for name in case.spec().elements}
        inputs |= {name: torch.randn(columns, device="cuda").to(DTYPES[dtype]) for name in case.spec().columns}
        inputs |= {name: torch.randn(rows, device="cuda") for name in case.spec().rows}
        assert_equal_outputs(pallas(case, inputs), triton(case, inputs))

    shapes = [(16384, 4096), (1024, 16384), (512, 151936), (65536, 128)]
    programs = ["softmax", "softmax_backward", "rms_norm(weight)", "layer_norm(weight, bias)", "sum", "logsumexp"]
    on_threads(
        lambda case: check(*case),
        [(programs[(i + k) % len(programs)], *shape) for i, shape in enumerate(shapes) for k in range(3)],
    )


SCHEDULES = [RowSchedule(), RowSchedule(warps=8), RowSchedule(warps=2), RowSchedule(block_rows=4), RowSchedule(persistent=True),
             RowSchedule(blocks_per_row=3), RowSchedule(warps=8, cooperative=True), RowSchedule(block_rows=2, warps=8),
             RowSchedule(warps=16)]  # fmt: skip


@pytest.mark.parametrize(
    "program", ["softmax", "rms_norm(weight)", "layer_norm(weight, bias)", "sum", "amax", "cross_entropy(smoothing)"]
)
def test_no_schedule_changes_a_bit(program):
    def check(columns, dtype):
        case = RowCase(program, dtype, 13, columns, seed=columns)
        inputs = drawn(case)
        expected = triton(case, inputs)
        ran = 0
        for engine in (triton, pallas):
            for schedule in SCHEDULES:
                try:
                    outputs = engine(case, inputs, schedule)
                except ValueError:
                    continue  # a schedule that this row does not allow
                ran += 1
                assert_equal_outputs(outputs, expected)
        assert ran >= 6

    on_threads(lambda case: check(*case), [(100, "bfloat16"), (2000, "float32"), (20000, "float16"), (151936, "bfloat16")])


@pytest.mark.parametrize(
    "program", ["softmax", "rms_norm(weight)", "layer_norm_backward(weight)", "token_logprobs", "logsumexp"]
)
def test_a_row_alone_in_a_batch_and_elsewhere(program):
    for columns in (128, 3072, 4096, 20000):
        case = RowCase(program, "bfloat16", 4096 if columns < 20000 else 300, columns, seed=columns)
        inputs = drawn(case)
        batch = triton(case, inputs)
        spec = case.spec()
        per_row = (*spec.elements, *spec.rows, *spec.ids)
        for rows in ([0], [17], [5, 5, 5], list(range(100, 164)), list(range(299, -1, -7))):
            part = {name: x[rows].contiguous() if name in per_row else x for name, x in inputs.items()}
            for _ in range(3):
                assert_equal_outputs(triton(case, part), {name: x[rows] for name, x in batch.items()})


def test_trailing_padding_is_neutral():
    for columns in (1, 100, 1000, 5000, 8192, 12000):
        x = torch.randn(9, columns, device="cuda")
        for more in (1, 24, 7000, 20000):
            zeros = torch.cat([x, x.new_zeros(9, more)], 1)
            assert_same(bi_torch.sum(zeros, -1), bi_torch.sum(x, -1))
            low = torch.cat([x, x.new_full((9, more), -torch.inf)], 1)
            assert_same(bi_torch.softmax(low, -1)[:, :columns].contiguous(), bi_torch.softmax(x, -1))
            assert_same(bi_torch.logsumexp(low, -1), bi_torch.logsumexp(x, -1))


def test_more_than_2_to_the_31_elements():
    x = torch.zeros(70000, 32768, device="cuda", dtype=torch.bfloat16)
    x[-3:].normal_()
    y = bi_torch.softmax(x, -1)
    assert_same(y[-3:], bi_torch.softmax(x[-3:].clone(), -1))


def test_public_functions_and_gradients():
    """On the GPU, in both frameworks, the bits of PyTorch's CPU engine."""

    def check(call, dtype):
        wanted = wanted_gradients(call)
        both = with_gradients(call, wanted)
        for kind in ("normal", "bits"):
            args = call.arguments(dtype, kind)
            in_jax, on_gpu = bits_to_jax(args), to_cuda(args)
            results = []
            for tensors in (args, on_gpu):
                for i in wanted:
                    tensors[i].requires_grad_()
                outputs = leaves(call_in(bi_torch, call, tensors))
                cotangents = [draw(*y.shape, dtype=NAMES[y.dtype], kind=kind, seed=9 + i) for i, y in enumerate(outputs)]
                moved = [x.to(y.device) for x, y in zip(cotangents, outputs, strict=True)]
                gradients = torch.autograd.grad(outputs, [tensors[i] for i in wanted], moved) if wanted else []
                results.append([*outputs, *gradients])
            expected, actual = results
            for got, want in zip(actual, expected, strict=True):
                assert_same(got.cpu(), want)
            if call.name.endswith("_"):
                continue
            outputs, pulled = both(in_jax, bits_to_jax(cotangents))
            for got, want in zip((*outputs, *pulled), expected, strict=True):
                same_in_jax(got, want)

    on_threads(lambda case: check(*case), [(call, list(FORMATS)[i % 3]) for i, call in enumerate(ROW_CALLS)])


def to_cuda(x):
    if isinstance(x, list):
        return [to_cuda(y) for y in x]
    return x.detach().cuda() if isinstance(x, torch.Tensor) else x


FUNCTIONS = {
    "exp": (scalar.exp, torch.exp, 2.0), "log": (scalar.log, torch.log, 2.0), "erf": (scalar.erf, torch.erf, 2.0),
    "tanh": (scalar.tanh, torch.tanh, 2.0), "sigmoid": (scalar.sigmoid, torch.sigmoid, 2.0),
    "rsqrt": (scalar.rsqrt, torch.rsqrt, 1.0), "sin": (scalar.sin, torch.sin, 2.0), "cos": (scalar.cos, torch.cos, 2.0),
    "exp2": (scalar.exp2, torch.exp2, 1.0), "expm1": (scalar.expm1, torch.expm1, 2.0), "log2": (scalar.log2, torch.log2, 2.0),
    "log1p": (scalar.log1p, torch.log1p, 2.0), "erfc": (scalar.erfc, torch.erfc, 4.5),
}  # fmt: skip
BLOCK = 1 << 26


@cache
def jitted(program):
    return jax.jit(lambda x: primitive.run_rows(program, {"x": x}, {}, {"y": "float32"})["y"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scalar_programs_on_every_float32(name, record_property):
    """All 2^32 inputs: Triton's bits are Pallas's, the error against float64 keeps its bound, and a sample is NumPy's."""
    program, (of, exact, bound) = getattr(pointwise, name.upper()), FUNCTIONS[name]
    worst, differing = 0.0, 0
    for start in range(-(1 << 31), 1 << 31, BLOCK):
        x = torch.arange(start, start + BLOCK, device="cuda", dtype=torch.int64).to(torch.int32).view(torch.float32)[None]
        y = cuda.run_rows(program, {"x": x}, {}, {"y": torch.float32})["y"]
        z = from_jax(jitted(program)(to_jax(x)).block_until_ready())
        differing += int((integers(y) != integers(z)).sum())
        worst = max(worst, float(ulp_error(x, y, exact, name)))
    record_property("worst ulp", worst)
    print(f"{name}: {differing} of 2^32 differ, worst error {worst:.3f} ulp")
    assert differing == 0
    assert worst <= bound
    sample = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    expected = float_format("float32").encode(of(NumpyArithmetic(), sample.view(np.float32)))
    x = to_torch(sample, float_format("float32")).cuda()[None]
    y = cuda.run_rows(program, {"x": x}, {}, {"y": torch.float32})["y"]
    assert_same(y[0].cpu(), to_torch(expected, float_format("float32")))


def test_pow_on_many_pairs():
    """Random patterns, and exponents for which the power is neither 0 nor infinite: Triton's bits are Pallas's and NumPy's."""
    run = jax.jit(lambda x1, x2: primitive.run_rows(pointwise.POW, {"x1": x1, "x2": x2}, {}, {"y": "float32"})["y"])
    torch.manual_seed(0)
    for finite in (False, True):
        x, y = (
            torch.randint(-(1 << 31), 1 << 31, (1, 1 << 24), device="cuda").to(torch.int32).view(torch.float32) for _ in "xy"
        )
        if finite:
            y = torch.empty_like(y).uniform_(-105, 90) / torch.log(x.abs().double()).float()
        z = cuda.run_rows(pointwise.POW, {"x1": x, "x2": y}, {}, {"y": torch.float32})["y"]
        assert_same(from_jax(run(to_jax(x), to_jax(y)).block_until_ready()), z)
        few = [v[0, : 1 << 18].cpu().numpy() for v in (x, y)]
        expected = float_format("float32").encode(scalar.pow(NumpyArithmetic(), *few))
        assert_same(z[0, : 1 << 18].cpu(), to_torch(expected, float_format("float32")))


def ulp_error(x, y, exact, name):
    """The largest error of y in units of the last place of the exact value, over the arguments that have a bound."""
    value = exact(x.double())
    assert torch.equal(torch.isnan(y), torch.isnan(value))
    overflowed = torch.isinf(y) & torch.isfinite(value)
    assert not bool((overflowed & (value.abs() < 2.0**128 * (1 - 2.0**-23))).any())
    checked = torch.isfinite(y) & torch.isfinite(value)
    if name in ("sin", "cos"):
        checked &= x.abs() <= 2.0**20
    value = torch.where(checked, value, 1.0)
    exponent = torch.frexp(value).exponent.clamp(min=-125)
    return ((torch.where(checked, y, 1.0).double() - value).abs() * torch.exp2((24 - exponent).double())).max()


def test_long_rows_in_several_streams_at_once():
    """Programs that wait for each other, beside those of other launches, in both frameworks."""
    inputs = [torch.randn(rows, n, device="cuda").bfloat16() for rows, n in ((64, 151_936), (3, 20_000), (512, 16_384))]
    layer_norm = jax.jit(lambda x: bi_jax.layer_norm(x, x.shape[1:]))
    norms = [from_jax(layer_norm(to_jax(x)).block_until_ready()) for x in inputs]
    expected = [bi_torch.softmax(x, -1) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        results, in_jax = [], [layer_norm(to_jax(x)) for x in inputs]
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(bi_torch.softmax(x, -1))
        jax.block_until_ready(in_jax)
        torch.cuda.synchronize()
        for actual, wanted in zip((*results, *map(from_jax, in_jax)), (*expected, *norms), strict=True):
            assert_same(actual, wanted)


def test_a_thread_whose_first_call_is_a_softmax():
    """It has no current context yet; neither memory from PyTorch's cache nor a launch that was prepared makes one."""
    x = torch.randn(64, 4096, device="cuda")
    expected = [bi_torch.softmax(x, -1) for _ in range(3)]
    with ThreadPoolExecutor(1) as thread:
        assert torch.equal(thread.submit(bi_torch.softmax, x, -1).result(), expected[0])
