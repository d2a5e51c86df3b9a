"""Row programs on CPU tensors against the reference model, and the public row functions of `bi_torch` on a CPU."""

from contextlib import contextmanager
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from torch.library import opcheck
from torch.testing._internal.common_methods_invocations import op_db

import bi_torch
from bi_torch.rows import cpu, cpu_arithmetic, elementary, embedding_kernel, library
from bi_torch.rows import embedding as embeddings
from bi_torch.rows import reduce as reductions
from bi_torch.rows import softmax as softmaxes
from shared_specs.formats import FORMATS
from shared_specs.inputs import KINDS
from shared_specs.programs import attention, norm, optimizer, pointwise, reduce, softmax
from shared_specs.programs.catalogue import COLUMN_PROGRAMS, SCALARS
from shared_specs.reference import NumpyArithmetic
from shared_specs.rotary import inverse_frequencies
from shared_specs.rows import ColumnProgram
from tests.arrays import DTYPES, assert_same, draw
from tests.interpreters.triton import gpu_arithmetic, interpreted
from tests.row_calls import ROW_CALLS
from tests.row_programs import ROW_PROGRAMS, draw_inputs, expected, pow_inputs, uneven_rows
from tests.test_scalar import fma_triples, patterns

dtypes = pytest.mark.parametrize("dtype", FORMATS)
by_name = {"ids": lambda program: program.name}


@contextmanager
def small_tiles(monkeypatch):
    """Tiles of one segment, so that small tensors take many."""
    with monkeypatch.context() as context:
        context.setattr(cpu, "SERIAL", 1 << 13)
        context.setattr(torch, "get_num_threads", lambda: 1)
        yield


# ---------------------------------------------------------------------------------------------------------- arithmetic

REFERENCE, TORCH = NumpyArithmetic(), cpu_arithmetic.TorchArithmetic()
SPECIAL = np.array([0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 2.0**-149, -(2.0**-126), 3.4e38, 2.0**-126], np.float32)


def float_pairs():
    x, y = patterns(50_000, 1), patterns(50_000, 2)
    grid = np.repeat(SPECIAL, len(SPECIAL)), np.tile(SPECIAL, len(SPECIAL))
    near = x[:5000], np.nextafter(x[:5000], np.float32(0))
    return [np.concatenate(side) for side in zip((x, y), grid, near, strict=True)]


def int_pairs():
    return [np.random.default_rng(seed).integers(-(1 << 31), 1 << 31, 50_000, np.int64).astype(np.int32) for seed in (3, 4)]


def counts():
    return np.arange(50_000, dtype=np.int32) % 32


def same(actual: torch.Tensor, wanted: np.ndarray) -> bool:
    """Equal bits, but for those of a NaN."""
    actual, wanted = actual.numpy(), np.asarray(wanted)
    assert actual.dtype == wanted.dtype
    if actual.dtype != np.float32:
        return np.array_equal(actual, wanted)
    both_nan = np.isnan(actual) & np.isnan(wanted)
    return np.array_equal(np.where(both_nan, 0, actual).view(np.int32), np.where(both_nan, 0, wanted).view(np.int32))


OPERATIONS = {
    **dict.fromkeys(("add", "sub", "mul", "div", "max", "min", "less", "equal"), float_pairs),
    **dict.fromkeys(("sqrt", "neg", "abs", "is_nan", "bits"), lambda: float_pairs()[:1]),
    **dict.fromkeys(("int_add", "int_sub", "int_mul", "mul_high", "int_and", "int_or", "int_xor"), int_pairs),
    **dict.fromkeys(("int_less", "int_equal"), int_pairs),
    **dict.fromkeys(("shift_left", "shift_right", "shift_right_logical"), lambda: (int_pairs()[0], counts())),
    **dict.fromkeys(("to_float", "from_bits"), lambda: int_pairs()[:1]),
    "to_int": lambda: [np.clip(np.nan_to_num(float_pairs()[0]), -(2.0**31), 2.0**31 - 256).astype(np.float32)],
    "fma": lambda: fma_triples().T.copy(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_operation(operation):
    operands = [np.ascontiguousarray(x) for x in OPERATIONS[operation]()]
    actual = getattr(TORCH, operation)(*map(torch.from_numpy, operands))
    assert same(actual, getattr(REFERENCE, operation)(*operands))
    # Each by itself: no vector instruction, no shortcut that other elements rule out.
    few = [x[:: max(1, len(x) // 200)] for x in operands]
    for row in zip(*few, strict=True):
        alone = getattr(TORCH, operation)(*(torch.from_numpy(x.reshape(1)) for x in row))
        assert same(alone, getattr(REFERENCE, operation)(*(x.reshape(1) for x in row)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("operation", ["add", "sub", "mul", "div", "max", "min"])
def test_operation_with_a_constant(operation):
    x = patterns(50_000, 5)
    for constant in (100.0, 3.0, 0.0, -0.0, 2.0**-149, float("inf"), float(np.float32(0.1))):
        for arguments in ((constant, x), (x, constant)):
            tensors = (torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in arguments)
            assert same(getattr(TORCH, operation)(*tensors), getattr(REFERENCE, operation)(*arguments))


def test_constants_are_float32():
    with pytest.raises(ValueError, match="0.1 is not a float32"):
        TORCH.add(torch.ones(1), 0.1)
    with pytest.raises(TypeError, match="two floats or two integers"):
        TORCH.select(torch.ones(1, dtype=torch.bool), 1.0, 1)


@dtypes
def test_rounding_to_an_output_dtype(dtype):
    x = np.concatenate([patterns(200_000, 6), SPECIAL, np.arange(1 << 16, dtype=np.uint32).view(np.float32)])
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)  # of bfloat16
    halves = (np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32) | 0x1000).view(np.float32)
    x = np.concatenate([x, ties, halves])
    fmt = FORMATS[dtype]
    bits = cpu_arithmetic.encode(torch.from_numpy(x), DTYPES[dtype]).view(torch.int16 if fmt.bits == 16 else torch.int32)
    np.testing.assert_array_equal(bits.numpy().view(fmt.storage), fmt.encode(x))
    assert same(TORCH.narrow(torch.from_numpy(x), dtype), REFERENCE.narrow(x, dtype))


# ------------------------------------------------------------------------------------------------------------ programs


def out_dtypes(program, dtype):
    return dict.fromkeys(program.sums if isinstance(program, ColumnProgram) else program.outputs, DTYPES[dtype])


def run(program, inputs, dtypes):
    execute = cpu.run_columns if isinstance(program, ColumnProgram) else cpu.run_rows
    return execute(program, inputs, SCALARS, dtypes)


def check(program, inputs, dtype):
    wanted = expected(program, inputs, out_dtypes(program, dtype))
    outputs = run(program, inputs, out_dtypes(program, dtype))
    assert set(outputs) == set(wanted)
    for name, value in wanted.items():
        assert_same(outputs[name], value)


def every_kind(program, n, dtype):
    """One row of each kind of input."""
    drawn = [draw_inputs(program, 1, n, dtype, kind, seed) for seed, kind in enumerate(KINDS)]
    columns = getattr(program, "columns", ())
    return {name: drawn[n % len(KINDS)][name] if name in columns else torch.cat([d[name] for d in drawn]) for name in drawn[0]}


@pytest.mark.parametrize("program", ROW_PROGRAMS, **by_name)
def test_every_row_program(program):
    for n, dtype in ((1, "float32"), (5, "bfloat16"), (128, "float16"), (1000, "float32"), (1025, "bfloat16")):
        check(program, every_kind(program, n, dtype), dtype)
    for rows, n in ((0, 5), (3, 0), (0, 0)):
        check(program, draw_inputs(program, rows, n, "float32"), "float32")


def test_special_values_of_pow():
    check(pointwise.POW, pow_inputs(), "float32")


REDUCING = [program for program in ROW_PROGRAMS if program.reductions]


@pytest.mark.parametrize("program", REDUCING, **by_name)
def test_long_rows(program, monkeypatch):
    check(program, draw_inputs(program, 2, 8193, "bfloat16", "special", 1), "bfloat16")
    inputs = draw_inputs(program, 1, 20_000, "float32", "normal", 2)
    check(program, inputs, "float32")
    whole = run(program, inputs, out_dtypes(program, "float32"))
    with small_tiles(monkeypatch):
        for name, value in run(program, inputs, out_dtypes(program, "float32")).items():
            assert_same(value, whole[name])


def test_segments_of_different_maxima(monkeypatch):
    inputs = {"x": uneven_rows(20_000), "length": torch.tensor([20_000, 16_385, 9000, 20_000, 5, 20_000])}
    check(attention.attention_softmax(True), inputs, "float32")
    with small_tiles(monkeypatch):
        check(attention.attention_softmax(True), inputs, "float32")


@pytest.mark.parametrize("n", [2, 3, 1023, 1024, 8191, 8192, 24_577, 70_000])
def test_order_of_a_sum(n):
    for program in (reduce.SUM, reduce.AMAX):
        check(program, every_kind(program, n, "float32"), "float32")


@pytest.mark.parametrize("program", COLUMN_PROGRAMS, **by_name)
def test_every_column_program(program, monkeypatch):
    for rows, n, dtype in ((0, 3, "float32"), (5, 40, "bfloat16"), (1030, 3, "float16"), (8200, 2, "float32")):
        check(program, draw_inputs(program, rows, n, dtype, "special", rows), dtype)
    with small_tiles(monkeypatch):
        check(program, draw_inputs(program, 3000, 70, "float32"), "float32")


@pytest.mark.parametrize("program", REDUCING, **by_name)
@pytest.mark.parametrize("n", [7, 1500])
def test_a_row_does_not_depend_on_the_batch(program, n, monkeypatch):
    inputs = draw_inputs(program, 40, n, "bfloat16")
    dtypes = out_dtypes(program, "bfloat16")
    whole = run(program, inputs, dtypes)
    with small_tiles(monkeypatch):
        for name, value in run(program, inputs, dtypes).items():
            assert_same(value, whole[name])
    for rows in (slice(0, 1), slice(17, 18), slice(3, 40, 6)):
        alone = run(program, {name: x if name in program.columns else x[rows] for name, x in inputs.items()}, dtypes)
        for name, value in alone.items():
            assert_same(value, whole[name][rows])


@pytest.mark.parametrize("n", [1, 5, 100, 1024, 1500, 8192])
@pytest.mark.parametrize("padding", [1, 3, 28, 900, 9000])
def test_padding_behind_a_row_is_neutral(n, padding):
    x = draw(3, n, dtype="bfloat16", kind="wide")
    for fill, programs in (
        (0.0, (reduce.SUM, optimizer.SUM_OF_SQUARES)),
        (-torch.inf, (softmax.LOGSUMEXP, softmax.SOFTMAX, softmax.LOG_SOFTMAX, reduce.AMAX)),
    ):
        padded = torch.nn.functional.pad(x, (0, padding), value=fill)
        for program in programs:
            dtypes = {"y": torch.float32}
            wanted, got = (cpu.run_rows(program, {"x": values}, {}, dtypes)["y"] for values in (x, padded))
            assert_same(got[:, :n] if got.dim() == 2 else got, wanted)


def test_rows_of_zeros_at_the_end_leave_sums_over_rows_alone():
    x = draw(300, 5, kind="wide")
    wanted = cpu.run_columns(norm.COLUMN_SUM, {"x": x}, {}, {})["y"]
    for rows in (1, 212, 724, 9000):
        padded = torch.cat([x, torch.zeros(rows, 5, dtype=x.dtype)])
        assert_same(cpu.run_columns(norm.COLUMN_SUM, {"x": padded}, {}, {})["y"], wanted)


def test_sums_over_rows_are_those_of_the_transposed_rows():
    x = draw(3000, 40, kind="wide")
    columns = cpu.run_columns(norm.COLUMN_SUM, {"x": x}, {}, {})["y"]
    assert_same(cpu.run_rows(reduce.SUM, {"x": x.T.contiguous()}, {}, {})["y"], columns)


def test_ids_of_both_widths():
    x = draw(4, 10)
    program = softmax.cross_entropy(False)
    ids = torch.tensor([1, 3, -(1 << 40), (1 << 32) + 1])
    scalars = {"ignore_index": 1}
    y = cpu.run_rows(program, {"x": x, "id": ids}, scalars, {})["y"]
    assert y[0] == 0
    assert y[2:].isnan().all()
    assert_same(y[:2], cpu.run_rows(program, {"x": x[:2], "id": ids[:2].int()}, scalars, {})["y"])


def test_outputs_may_be_inputs(monkeypatch):
    program = optimizer.sgd(momentum=True, nesterov=True, first=False)
    inputs = draw_inputs(program, 3, 30_000, "float32")
    dtypes = out_dtypes(program, "float32")
    wanted = cpu.run_rows(program, inputs, SCALARS, dtypes)
    outs = {name: inputs[name] for name in program.outputs}
    with small_tiles(monkeypatch):
        cpu.run_rows(program, inputs, SCALARS, dtypes, outs=outs)
    for name, value in wanted.items():
        assert_same(inputs[name], value)


@contextmanager
def flush_denormal():
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("shape", [(3, 100), (2, 20_000)])
def test_flush_denormal_mode_changes_no_bit(shape):
    x, g = (draw(*shape, dtype="float32", kind="subnormal", seed=seed) for seed in (0, 1))
    ids = torch.arange(3).repeat_interleave(shape[0])[: shape[0]]

    def results():
        return (
            bi_torch.sum(x, -1),
            bi_torch.exp(x),
            bi_torch.silu_mul(x, g),
            cpu.run_columns(norm.COLUMN_SUM, {"x": x}, {}, {})["y"],
            torch.ops.bi_torch.embedding_backward(g, ids, 3, -1, torch.float32),
        )

    wanted = results()
    with flush_denormal():
        got = results()
        assert not (torch.tensor([1e-40]) * 1.0).view(torch.int32).any(), "the mode is the caller's again"
    for a, b in zip(got, wanted, strict=True):
        assert_same(a, b)
    assert wanted[0].view(torch.int32).any()


def test_a_worker_that_flushes_is_found(monkeypatch):
    """Only part of a large tensor is flushed where torch's workers have the mode and the caller has not."""
    size, probe = 2 * cpu.SERIAL, cpu._probe
    flushed = torch.zeros(size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu, "_probe", lambda n: flushed if n == size else probe(n))
    assert cpu._flushed(2) == [False, True]
    with cpu.subnormals_kept(size) as tile:
        assert tile == cpu.SERIAL
    with cpu.subnormals_kept(100) as tile:
        assert tile == cpu.SERIAL


# --------------------------------------------------------------------------------------------------- public functions


def call(row_call, arguments):
    """The public function on positional tensors and options."""
    options, tensors = dict(row_call.options), list(arguments)
    if "normalized_shape" in options:
        tensors.insert(1, options.pop("normalized_shape"))
    while tensors and tensors[-1] is None:
        tensors.pop()
    return getattr(bi_torch, row_call.name)(*tensors, **options)


def flat(results):
    """Tensors of a result in order."""
    if isinstance(results, torch.Tensor):
        return [results]
    return [x for result in results or () for x in flat(result)]


calls = pytest.mark.parametrize("row_call", ROW_CALLS, ids=str)
differentiable = pytest.mark.parametrize("row_call", [c for c in ROW_CALLS if c.differentiable], ids=str)


def rms_norm_64(x, shape, weight=None):
    """torch takes the epsilon of float64 here; bi_torch that of its input, float32."""
    return torch.nn.functional.rms_norm(x, shape, weight, torch.finfo(torch.float32).eps)


def rotary_64(x, cos, sin, interleaved):
    x1, x2 = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    pairs = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)


# What torch computes, to be called in float64.
STOCK = {
    **{name: getattr(torch, name) for name in ("sum", "mean", "amax", "amin", "var", "logsumexp", "softmax", "log_softmax")},
    **{name: getattr(torch, name) for name in ("exp", "log", "sin", "cos", "erf", "tanh", "sigmoid", "rsqrt")},
    **{name: getattr(torch.nn.functional, name) for name in ("cross_entropy", "layer_norm", "embedding", "gelu", "silu")},
    "token_logprobs": lambda x, ids, temperature=1.0: (x / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0],
    "rms_norm": rms_norm_64,
    "fused_add_rms_norm": lambda x, r, w=None: (torch.nn.functional.rms_norm(x + r, (10,), w, 1e-6), x + r),
    "silu_mul": lambda gate, up: torch.nn.functional.silu(gate) * up,
    "rotary_embedding": rotary_64,
}


def stock(row_call, arguments):
    options, tensors = dict(row_call.options), list(arguments)
    if "normalized_shape" in options:
        tensors.insert(1, options.pop("normalized_shape"))
    return STOCK[row_call.name](*tensors, **options)


def test_every_public_row_function_is_called():
    rows = {name for name in bi_torch.__all__ if getattr(bi_torch, name).__module__.startswith("bi_torch.rows.")}
    assert {c.name for c in ROW_CALLS} == rows


@differentiable
@dtypes
def test_values_and_gradients_are_those_of_torch(row_call, dtype):
    arguments = row_call.arguments(dtype)
    wanting = [i for i, x in enumerate(arguments) if x is not None and x.is_floating_point() and i not in row_call.fixed]
    exact = [x.double() if x is not None and x.is_floating_point() else x for x in arguments]
    for i in wanting:
        arguments[i].requires_grad_()
        exact[i].requires_grad_()
    outputs, exact_outputs = flat(call(row_call, arguments)), flat(stock(row_call, exact))
    relative = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    for got, want in zip(outputs, exact_outputs, strict=True):
        assert got.dtype == (torch.float32 if row_call.name == "token_logprobs" else DTYPES[dtype])
        torch.testing.assert_close(got.double(), want, rtol=relative, atol=relative)
    cotangents = [draw(*y.shape, dtype="float32", seed=9 + i).to(y.dtype) for i, y in enumerate(outputs)]
    got = torch.autograd.grad(outputs, [arguments[i] for i in wanting], cotangents)
    want = torch.autograd.grad(exact_outputs, [exact[i] for i in wanting], [g.double() for g in cotangents])
    for a, b, i in zip(got, want, wanting, strict=True):
        assert (a.shape, a.dtype) == (arguments[i].shape, arguments[i].dtype)
        torch.testing.assert_close(a.double(), b, rtol=2 * relative, atol=2 * relative)


@calls
def test_layouts_and_meta_tensors(row_call):
    """Views give the bits of contiguous tensors; meta tensors give shapes and dtypes."""
    arguments = row_call.arguments("bfloat16")
    inside = list(arguments[0]) if row_call.listed else arguments

    def each(change):
        changed = [x if x is None else change(x) for x in inside]
        return [changed] if row_call.listed else changed

    def strided(x):
        return torch.stack([x, x], -1)[..., 0] if x.dim() else x

    wanted = flat(call(row_call, each(torch.clone)))
    if not row_call.name.endswith("_"):
        for view in (strided, lambda x: x.mT.contiguous().mT if x.dim() > 1 else x):
            for got, want in zip(flat(call(row_call, each(view))), wanted, strict=True):
                assert_same(got.contiguous(), want.contiguous())
    for got, want in zip(flat(call(row_call, each(lambda x: x.to("meta")))), wanted, strict=True):
        assert got.is_meta
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@calls
def test_bad_arguments(row_call):
    arguments = row_call.arguments("float32")
    name = row_call.name
    for change, error, message in (
        (lambda x: x.double(), RuntimeError, r"must be torch\.\w+(, torch\.\w+)*( or torch\.\w+)?, got torch\.float64"),
        (lambda x: x.tolist(), TypeError, r"must be a torch\.Tensor, got (list|int|float)"),
        (lambda x: x.to_sparse(), RuntimeError, "must be a dense tensor, got layout torch.sparse_coo"),
    ):
        if row_call.listed and name == "clip_by_global_norm":
            changed = [[*arguments[0][:-1], change(arguments[0][-1])]]
        else:
            changed = [change(arguments[0]), *arguments[1:]]
        with pytest.raises(error, match=rf"bi_torch\.{name}: [\w\[\]]+ {message}"):
            call(row_call, changed)
    others = [i for i, x in enumerate(arguments) if i and x is not None]
    for i in others:
        moved = [x.to("meta") if i == j else x for j, x in enumerate(arguments)]
        with pytest.raises(RuntimeError, match=rf"bi_torch\.{name}: \w+ must be on (cpu|meta), got (cpu|meta)"):
            call(row_call, moved)


def test_modes():
    x = draw(3, 10).requires_grad_()
    wanted = bi_torch.softmax(x, -1)
    assert wanted.requires_grad
    with torch.no_grad():
        assert not bi_torch.softmax(x, -1).requires_grad
    with torch.inference_mode():
        inferred = bi_torch.softmax(x, -1)
        assert inferred.is_inference()
    assert_same(inferred, wanted)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(bi_torch.softmax(x, -1), wanted)
        assert_same(bi_torch.amax(torch.tensor([-0.0, -1.0], dtype=torch.float32)), torch.tensor(-0.0, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert_same(bi_torch.softmax(x, -1), wanted)
    with pytest.raises(RuntimeError, match="forward"), torch.autograd.forward_ad.dual_level():
        bi_torch.softmax(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()), -1)


@differentiable
def test_second_order_gradients_are_refused(row_call):
    arguments = row_call.arguments()
    wanting = [x for x in arguments if x is not None and x.is_floating_point()]
    for x in wanting:
        x.requires_grad_()
    outputs = flat(call(row_call, arguments))
    first = torch.autograd.grad(sum(y.square().sum() for y in outputs), wanting[0], create_graph=True)
    if not first[0].grad_fn:
        return
    with pytest.raises(RuntimeError, match="has no gradient; second-order gradients"):
        torch.autograd.grad(first[0].square().sum(), wanting[0])


@pytest.fixture(scope="module")
def recorded():
    """Arguments of every op in the calls above, forward and backward."""
    found, original = {}, library.Op.__call__

    def record(self, *arguments):
        found.setdefault(self.name, tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments))
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.Op, "__call__", record)
        for row_call in ROW_CALLS:
            arguments = row_call.arguments()
            if row_call.differentiable:
                wanting = [x for x in arguments if x is not None and x.is_floating_point()]
                for x in wanting:
                    x.requires_grad_()
                sum(y.float().sum() for y in flat(call(row_call, arguments))).backward()
            else:
                call(row_call, arguments)
        x = draw(4, 6, dtype="float32").requires_grad_()
        nll, _ = softmaxes.nll_loss(x, torch.tensor([0, 5, 2, 2]))
        mse, deviations = reductions.squared_error(x, x * 2, True), reductions.std(x, 1)
        (nll + mse + reductions.norm(x) + deviations.sum()).backward()
        for function in (*elementary.FUNCTIONS.values(), lambda x: elementary.power(x, 3, x.dtype)):
            function(x.detach())
    return found


THOROUGH = ("softmax", "layer_norm", "fused_add_rms_norm", "cross_entropy", "embedding", "silu_mul")
"""One of each kind of schema: what they have in common need not be checked for all."""


def test_every_op_is_recorded(recorded):
    registered = {op for op in dir(torch.ops.bi_torch) if hasattr(getattr(torch.ops.bi_torch, op), "default")} - {"gemm"}
    in_place = {op for op in registered if op.endswith("_")}
    attention = {op for op in registered if "attention" in op} | {"finite_or_nan"}  # tests/test_attention.py
    assert set(recorded) - attention == registered - in_place - attention
    for op, arguments in recorded.items():
        checks = ("test_schema", "test_faketensor")
        opcheck(getattr(torch.ops.bi_torch, op).default, arguments, test_utils=checks)


@pytest.mark.parametrize("op", THOROUGH)
def test_registration(op, recorded):
    """Autograd registration and AOT dispatch too, as PyTorch itself checks them."""
    arguments = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in recorded[op]]
    opcheck(getattr(torch.ops.bi_torch, op).default, tuple(arguments))


def test_registration_of_updates_in_place():
    x = [draw(1, 10, dtype="float32", seed=seed).abs() for seed in range(4)]
    ops = torch.ops.bi_torch
    opcheck(ops.sgd_.default, (*x[:2], 0.1, 0.0))
    opcheck(ops.sgd_momentum_.default, (*x[:3], 0.1, 0.0, 0.9, 0.0, True, False))
    opcheck(ops.adamw_.default, (*x, 0.1, 0.9, 0.99, 1e-8, 0.01, 3))


COMPILED = [c for c in ROW_CALLS if c.name in ("var", "cross_entropy", "layer_norm", "embedding", "rotary_embedding")][::2]


@pytest.mark.parametrize("row_call", COMPILED, ids=str)
def test_compiled_programs_keep_the_ops(row_call):
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    arguments = row_call.arguments()
    torch._dynamo.reset()
    torch.compile(lambda *args: call(row_call, args), fullgraph=True, backend=backend)(*arguments)
    assert any("bi_torch." in str(node.target) for graph in graphs for node in graph.graph.nodes)
    wanting = [x.requires_grad_() for i, x in enumerate(arguments) if x is not None and x.is_floating_point()]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: call(row_call, args), fullgraph=True, backend="aot_eager")
    for got, want in zip(flat(compiled(*arguments)), flat(call(row_call, arguments)), strict=True):
        assert_same(got.detach(), want.detach())
        for a, b in zip(
            torch.autograd.grad(got.sum(), wanting, allow_unused=True),
            torch.autograd.grad(want.sum(), wanting, allow_unused=True),
            strict=True,
        ):
            assert a is b is None or torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------ single families

EMPTY = [((0,), None), ((2, 0), 1), ((0, 3), 0), ((0, 3), 1), ((2, 0, 3), (0, 1)), ((), ()), ((), 0), ((1, 1), (0, 1))]


@pytest.mark.parametrize(("shape", "dim"), EMPTY)
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_reductions_of_few_elements(shape, dim):
    x = draw(*shape, dtype="float32") if 0 not in shape else torch.empty(shape)
    for name in ("sum", "mean", "var", "logsumexp", "amax", "amin"):
        for keepdim in (False, True):
            arguments = (x, dim if name != "logsumexp" or dim else tuple(range(x.dim())), keepdim)
            if name == "var":
                arguments, options = arguments[:2], {"keepdim": keepdim}
            else:
                options = {}
            if name.startswith("am") and dim is None:
                with pytest.raises(RuntimeError, match="empty input"):
                    getattr(bi_torch, name)(*arguments)
                continue
            try:
                wanted = getattr(torch, name)(*arguments, **options)
            except (RuntimeError, IndexError) as error:
                with pytest.raises(type(error)):
                    getattr(bi_torch, name)(*arguments, **options)
                continue
            torch.testing.assert_close(getattr(bi_torch, name)(*arguments, **options), wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64])
def test_reductions_of_integers(dtype):
    x = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 7, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_equal = torch.testing.assert_close
    for dim in (None, 1, (0, 2)):
        assert_equal(bi_torch.sum(x, dim), torch.sum(x, dim), rtol=0, atol=0)
        assert_equal(bi_torch.sum(x, dim, dtype=torch.float32), torch.sum(x, dim, dtype=torch.float32))
        assert_equal(bi_torch.mean(x, dim, dtype=torch.float32), torch.mean(x, dim, dtype=torch.float32))
        assert_equal(bi_torch.logsumexp(x, dim or (0, 1, 2)), torch.logsumexp(x, dim or (0, 1, 2)))
        for name in ("amax", "amin"):
            assert_equal(getattr(bi_torch, name)(x, dim or ()), getattr(torch, name)(x, dim or ()), rtol=0, atol=0)
    assert_equal(bi_torch.softmax(x, 1, torch.bfloat16), torch.softmax(x, 1, torch.bfloat16))
    assert bi_torch.sum(draw(4), dtype=torch.int64).dtype == torch.int64
    for function in (bi_torch.mean, bi_torch.var):
        with pytest.raises(RuntimeError, match=r"input must be .* torch.float32, got"):
            function(x)


def test_signed_zeros_and_nan():
    zeros = torch.tensor([[-0.0, 0.0], [0.0, -0.0], [-0.0, -0.0], [-1.0, -0.0], [1.0, 0.0], [1.0, -0.0]])
    assert bi_torch.amax(zeros, 1).signbit().tolist() == [False, False, True, True, False, False]
    assert bi_torch.amin(zeros, 1).signbit().tolist() == [True, True, True, True, False, True]
    nan = torch.tensor([1.0, float("nan"), float("inf")])
    for name in ("amax", "amin", "sum", "mean", "var"):
        y = getattr(bi_torch, name)(nan)
        assert y.view(torch.int32) == 0x7FFFFFFF
    assert bi_torch.softmax(nan.bfloat16(), 0).view(torch.int16).tolist() == [0x7FFF] * 3


def test_rows_of_infinities():
    inf = float("inf")
    x = torch.tensor([[-inf, -inf], [-inf, 1.0], [inf, 1.0], [inf, inf]])
    for name in ("softmax", "log_softmax", "logsumexp"):
        torch.testing.assert_close(getattr(bi_torch, name)(x, 1), getattr(torch, name)(x, 1), equal_nan=True)


@dtypes
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_token_logprobs_is_log_softmax_and_a_gather(dtype, temperature):
    logits, ids = draw(4, 9, 300, dtype=dtype), torch.randint(300, (4, 9))
    whole = bi_torch.log_softmax(logits, -1, torch.float32)
    if temperature is not None:
        scaled = logits.float() / temperature
        whole = bi_torch.log_softmax(scaled, -1)
    assert_same(bi_torch.token_logprobs(logits, ids, temperature), whole.gather(-1, ids[..., None])[..., 0])
    ids[1, 2], ids[2, 3] = -1, 300
    assert bi_torch.token_logprobs(logits, ids, temperature).isnan().nonzero().tolist() == [[1, 2], [2, 3]]


def test_fused_add_rms_norm_is_both_after_one_another():
    x, residual, weight = (draw(*shape, seed=i) for i, shape in enumerate([(5, 300), (5, 300), (300,)]))
    y, h = bi_torch.fused_add_rms_norm(x, residual, weight, 1e-5)
    assert_same(h, x + residual)
    assert_same(y, bi_torch.rms_norm(h, (300,), weight, 1e-5))


def test_weights_of_norms_may_be_float32():
    x, weight, bias = draw(5, 30), draw(30, dtype="float32"), draw(30, dtype="float32", seed=1)
    weight.requires_grad_()
    y = bi_torch.layer_norm(x, (30,), weight, bias)
    assert y.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(y.float().sum(), weight)
    assert gradient.dtype == torch.float32
    with pytest.raises(RuntimeError, match="weight must be torch.bfloat16 or torch.float32, got torch.float16"):
        bi_torch.rms_norm(x, (30,), weight.half())


def test_embedding_copies_bits():
    weight = draw(300, 7, kind="bits")
    ids = torch.randint(300, (4, 5))
    assert torch.equal(bi_torch.embedding(ids, weight).view(torch.int16), weight.view(torch.int16)[ids])
    assert_same(bi_torch.embedding(ids.int(), weight), bi_torch.embedding(ids, weight))
    for wrong in (-1, 300):
        with pytest.raises(IndexError, match="out of range"):
            bi_torch.embedding(torch.tensor([wrong]), weight)


def embedding_gradient(g, ids, rows, padding_idx, dtype):
    """The contract, token by token."""
    sums = torch.zeros(rows, g.shape[1])
    for row, cotangent in zip(ids.tolist(), g.float(), strict=True):
        if row != padding_idx:
            sums[row] += cotangent
    return cpu_arithmetic.encode(sums, dtype)


EMBEDDINGS = {"cpu": embeddings._backward_cpu, "triton": interpreted(embedding_kernel).backward}


@pytest.mark.parametrize("engine", EMBEDDINGS)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "d", "padding_idx"), [(0, 5, -1), (1, 1, -1), (60, 700, -1), (60, 3, 2), (60, 0, -1)])
def test_order_of_an_embedding_gradient(engine, tokens, d, padding_idx, id_dtype, monkeypatch):
    for dtype, kind in (("float32", "wide"), ("bfloat16", "special"), ("float16", "zeros")):
        g = draw(tokens, d, dtype=dtype, kind=kind)
        ids = torch.randint(8, (tokens,), generator=torch.Generator().manual_seed(0)).square_().to(id_dtype)
        wanted = embedding_gradient(g, ids, 50, padding_idx, g.dtype)
        with gpu_arithmetic(), small_tiles(monkeypatch):
            assert_same(EMBEDDINGS[engine](g, ids, 50, padding_idx, g.dtype), wanted)


def test_rotary_tables():
    getcontext().prec = 40
    for head_dim, theta in ((64, 10000.0), (128, 500000.0), (2, 3.7)):
        frequencies = inverse_frequencies(head_dim, theta)
        exact = [Decimal(theta) ** (Decimal(-2 * i) / head_dim) for i in range(head_dim // 2)]
        for got, want in zip(frequencies, exact, strict=True):
            neighbours = (np.nextafter(got, np.float32(end)) for end in (-np.inf, np.inf))
            assert all(abs(Decimal(float(got)) - want) <= abs(Decimal(float(x)) - want) for x in neighbours)
        positions = torch.tensor([[0, 1, 77], [1000, 131_071, 1 << 20]])
        angles = positions[..., None].float() * torch.from_numpy(frequencies.copy())
        cos, sin = bi_torch.rotary_tables(positions, head_dim, theta)
        assert_same(cos, bi_torch.cos(angles))
        assert_same(sin, bi_torch.sin(angles))
    for wrong in (3, 0):
        with pytest.raises(ValueError, match="head_dim must be a positive even number"):
            bi_torch.rotary_tables(positions, wrong)


def test_rotary_embedding_keeps_rows_apart():
    x = draw(2, 5, 3, 8)
    cos, sin = bi_torch.rotary_tables(torch.arange(5), 8)
    whole = bi_torch.rotary_embedding(x, cos[:, None], sin[:, None])
    assert_same(bi_torch.rotary_embedding(x[:, 3], cos[3], sin[3]), whole[:, 3])
    with pytest.raises(RuntimeError, match=r"cos must broadcast to \[2, 5, 3, 4\], got \[5, 4\]"):
        bi_torch.rotary_embedding(x, cos, sin)


SGD = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]


@pytest.mark.parametrize("options", SGD, ids=str)
def test_steps_of_sgd(options):
    param = torch.nn.Parameter(draw(5, 3, dtype="float32"))
    stock, (p, buffer), in_place, b = torch.optim.SGD([param], lr=0.1, **options), (param.detach().clone(), None), None, None
    in_place = torch.nn.Parameter(p.clone())
    for seed in range(4):
        param.grad = draw(5, 3, dtype="float32", seed=seed)
        stock.step()
        p, buffer = bi_torch.sgd(p, param.grad, buffer, lr=0.1, **options)
        version = in_place._version
        b = bi_torch.sgd_(in_place, param.grad, b, lr=0.1, **options)
        assert in_place._version > version
        assert_same(in_place.detach(), p)
        torch.testing.assert_close(p, param.detach())


def test_steps_of_adamw():
    param = torch.nn.Parameter(draw(5, 3, dtype="float32"))
    stock, p, m = torch.optim.AdamW([param]), param.detach().clone(), torch.zeros(5, 3)
    v, in_place = m, [torch.nn.Parameter(p.clone()), m.clone(), m.clone()]
    for step in range(1, 5):
        param.grad = draw(5, 3, dtype="float32", seed=step)
        stock.step()
        p, m, v = bi_torch.adamw(p, param.grad, m, v, step)
        bi_torch.adamw_(in_place[0], param.grad, *in_place[1:], step)
        for got, want in zip(in_place, (p, m, v), strict=True):
            assert_same(got.detach(), want)
        torch.testing.assert_close(p, param.detach())


def test_moments_may_be_float32_beside_bfloat16_parameters():
    p, g, m, v = draw(7), draw(7, seed=1), torch.zeros(7), torch.zeros(7)
    new, new_m, new_v = bi_torch.adamw(p, g, m, v, 1)
    assert (new.dtype, new_m.dtype, new_v.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    bi_torch.adamw_(p, g, m, v, 1)
    for got, want in zip((p, m, v), (new, new_m, new_v), strict=True):
        assert_same(got, want)


def test_bad_steps():
    x = torch.zeros(4, 3)
    for call, message in (
        (lambda: bi_torch.sgd(x, x, x, lr=0.1), "a buffer needs momentum"),
        (lambda: bi_torch.sgd(x, x, lr=0.1, nesterov=True), "nesterov needs momentum"),
        (lambda: bi_torch.adamw(x, x, x, x, 0), "step must be a positive int, got 0"),
        (lambda: bi_torch.clip_by_global_norm([], 1.0), "grads must not be empty"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match=r"adamw: grad must have shape \[4, 3\], got \[3, 4\]"):
        bi_torch.adamw(x, x.t(), x, x, 1)
    with pytest.raises(RuntimeError, match="param must be contiguous"):
        bi_torch.adamw_(torch.zeros(3, 4).t(), x, x, x, 1)


def test_clip_by_global_norm():
    grads = [draw(30, 5, dtype="float32"), draw(7, seed=1), draw(dtype="float16", seed=2)]
    clipped, norm = bi_torch.clip_by_global_norm(grads, 1.0)
    exact = torch.sqrt(sum(g.double().square().sum() for g in grads))
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
    for got, grad in zip(clipped, grads, strict=True):
        assert (got.shape, got.dtype) == (grad.shape, grad.dtype)
        torch.testing.assert_close(got, (grad.double() / (exact + 1e-6)).to(grad.dtype))
    for got, grad in zip(bi_torch.clip_by_global_norm(grads, 1e6)[0], grads, strict=True):
        assert_same(got, grad)


# ------------------------------------------------------------------------------------------------ torch's own samples

VARIANTS = ("", "with_dtype")
INFOS = [op for op in op_db if op.name.removeprefix("nn.functional.") in STOCK and op.variant_test_name in VARIANTS]
UNSUPPORTED = {"weight", "unbiased", "max_norm", "norm_type", "scale_grad_by_freq", "sparse", "out"}
"""Keywords of torch's functions that bi_torch's do not have."""


def supported(sample):
    """Neither such a keyword, nor class probabilities as targets, nor more dimensions than torch takes."""
    probabilities = sample.args and isinstance(sample.args[0], torch.Tensor) and sample.args[0].shape == sample.input.shape
    return not (sample.kwargs.keys() & UNSUPPORTED or probabilities or sample.input.dim() > 64)


def ours(info, sample):
    """bi_torch's function on the sample, which has the weight of an embedding first."""
    name = info.name.removeprefix("nn.functional.")
    arguments = (sample.args[0], sample.input, *sample.args[1:]) if name == "embedding" else (sample.input, *sample.args)
    return getattr(bi_torch, name)(*arguments, **sample.kwargs)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.formatted_name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore")
def test_samples_of_torch(info, dtype):
    tried = 0
    for sample in info.sample_inputs("cpu", DTYPES[dtype], requires_grad=False):
        if not supported(sample):
            continue
        if sample.kwargs.get("dtype") == torch.float64:
            with pytest.raises(RuntimeError, match="got torch.float64"):
                ours(info, sample)
            sample.kwargs["dtype"] = torch.float32
        wanted, got = info.op(sample.input, *sample.args, **sample.kwargs), ours(info, sample)
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        relative = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, wanted, rtol=10 * relative, atol=10 * relative, equal_nan=True)
        tried += 1
    assert tried


@pytest.mark.parametrize("info", [i for i in INFOS if i.error_inputs_func], ids=lambda info: info.formatted_name)
def test_errors_of_torch(info):
    for error in info.error_inputs("cpu"):
        if supported(error.sample_input):
            with pytest.raises(error.error_type):
                ours(info, error.sample_input)
