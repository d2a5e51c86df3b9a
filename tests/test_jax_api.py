"""The products of `bi_jax` on a CPU: values, bits, arguments, errors, lowering and export."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import bi_jax
from shared_specs import gemm_contract
from shared_specs.formats import float_format
from shared_specs.inputs import operand_bits
from shared_specs.reference import gemm as reference
from tests.calls import CALLS
from tests.model_engines import model_engines


def draw(*shape, dtype="bfloat16", kind="normal", seed=0):
    fmt = float_format(dtype)
    bits = operand_bits(kind, (1, *shape), fmt, seed + 10 * len(shape))[0]
    return jnp.asarray(np.asarray(bits).view(jnp.dtype(dtype)))


def bits(x):
    return np.ascontiguousarray(x).view(float_format(x.dtype.name).storage)


def model(a, b, bias=None, *, alpha=1.0, beta=1.0, out_dtype=None):
    """Bits of alpha * (a @ b) + beta * bias by the reference model; operands are [*, M, K] and [*, K, N]."""
    options = {"alpha": alpha, "beta": beta, "out_format": float_format(out_dtype or a.dtype.name)}
    if bias is not None:
        options |= {"bias_bits": bits(bias), "bias_format": float_format(bias.dtype.name)}
    return reference(bits(a), bits(b), gemm_contract(a.dtype.name), **options)


def assert_same(actual, expected):
    np.testing.assert_array_equal(bits(actual), expected if isinstance(expected, np.ndarray) else bits(expected))


STOCK = {
    "mm": np.matmul,
    "bmm": np.matmul,
    "matmul": np.matmul,
    "addmm": lambda bias, a, b: bias + a @ b,
    "baddbmm": lambda bias, a, b: bias + a @ b,
    "linear": lambda x, weight, bias: x @ weight.T + bias,
}
ops = pytest.mark.parametrize("op", CALLS)


def arguments(op, dtype="bfloat16"):
    return [draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(CALLS[op])]


def test_every_public_function_is_tested():
    rows = {name for name in bi_jax.__all__ if getattr(bi_jax, name).__module__.startswith("bi_jax.rows.")}
    transform = {name for name in bi_jax.__all__ if getattr(bi_jax, name).__module__.startswith("bi_jax.transform.")}
    assert set(bi_jax.__all__) - rows - transform == {*CALLS, "workspace_bytes", "scaled_dot_product_attention"}


@ops
def test_arguments_are_those_of_bi_torch(op):
    expected = {"linear": "input weight bias", "addmm": "bias a b", "baddbmm": "bias a b"}.get(op, "a b").split()
    parameters = inspect.signature(getattr(bi_jax, op)).parameters
    assert [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == expected
    keywords = {"addmm": "beta alpha ", "baddbmm": "beta alpha "}.get(op, "") + "out_dtype"
    assert [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY] == keywords.split()


@pytest.mark.parametrize(("op", "dtype"), [*((op, "bfloat16") for op in CALLS), ("linear", "float16"), ("linear", "float32")])
def test_values(op, dtype):
    args = arguments(op, dtype)
    exact = STOCK[op](*(np.asarray(x, np.float64) for x in args))
    size = STOCK[op](*(abs(np.asarray(x, np.float64)) for x in args))
    chain = 2.0**-21 if dtype == "float32" else 2.0**-19
    out = getattr(bi_jax, op)(*args)
    assert (out.shape, out.dtype.name) == (exact.shape, dtype)
    bound = float(jnp.finfo(dtype).eps) * abs(exact) + chain * size
    assert (abs(np.asarray(out, np.float64) - exact) <= bound).all()
    if (op, dtype) == ("linear", "bfloat16"):
        assert_same(jax.jit(bi_jax.linear)(*args), out)


@pytest.mark.parametrize(("m", "k", "n"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty_extents(m, k, n):
    a, b, bias = draw(m, k), draw(k, n, seed=1), draw(m, n, seed=2)
    assert_same(bi_jax.mm(a, b), model(a, b))
    assert_same(bi_jax.addmm(bias, a, b, beta=0.5), model(a, b, bias, beta=0.5))
    assert bi_jax.bmm(jnp.zeros((0, m, k), a.dtype), jnp.zeros((0, k, n), a.dtype)).shape == (0, m, n)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (6, 1), (6, 5)])
def test_bias_broadcasts(shape):
    a, b, bias = draw(6, 20), draw(20, 5, seed=1), draw(*shape, seed=3)
    assert_same(bi_jax.addmm(bias, a, b, alpha=0.1, beta=-1.7), model(a, b, bias, alpha=0.1, beta=-1.7))
    wide = draw(*shape, dtype="float32", seed=3)
    actual = bi_jax.baddbmm(wide, a[None], b[None], alpha=0.1, out_dtype="float32")
    assert_same(actual, model(a[None], b[None], wide, alpha=0.1, out_dtype="float32"))


def test_beta_zero_does_not_read_the_bias():
    a, b, bias = draw(6, 20), draw(20, 5, seed=1), jnp.full((6, 5), jnp.nan, jnp.bfloat16)
    for beta in (0, -0.0, 1e-60):
        assert_same(bi_jax.addmm(bias, a, b, beta=beta), model(a, b))
    assert jnp.isnan(bi_jax.addmm(bias, a, b)).all()


def test_numpy_arrays_and_out_dtypes_by_any_name():
    a, b = np.ones((2, 3), np.float32), np.full((3, 4), 2, np.float32)
    for out_dtype in (None, "float32", np.float32, jnp.float32, np.dtype("float32")):
        assert_same(bi_jax.mm(a, b, out_dtype=out_dtype), np.full((2, 4), 6, np.float32).view(np.uint32))


def bf16(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


ERRORS = [
    ("mm", (bf16(2, 3), bf16(4, 5)), ValueError, r"reduced extents differ: \(2, 3\) and \(4, 5\)"),
    ("mm", (bf16(2, 3), bf16(3)), ValueError, r"b must have 2 dimensions, got \(3,\)"),
    ("addmm", (bf16(4), bf16(2, 3), bf16(3, 5)), ValueError, r"bias \(4,\) does not broadcast to \(2, 5\)"),
    ("addmm", (bf16(1, 2, 5), bf16(2, 3), bf16(3, 5)), ValueError, "bias .* does not broadcast"),
    ("bmm", (bf16(2, 2, 3), bf16(1, 3, 4)), ValueError, "batch sizes differ"),
    ("baddbmm", (bf16(3, 1, 1), bf16(2, 2, 3), bf16(2, 3, 4)), ValueError, "bias .* does not broadcast"),
    ("matmul", (bf16(), bf16(3)), ValueError, "at least one dimension"),
    ("matmul", (bf16(2, 4, 3), bf16(3, 3, 5)), ValueError, "batch dimensions do not broadcast"),
    ("linear", (bf16(2, 3), bf16(3, 4)), ValueError, "reduced extents differ"),
    ("linear", (bf16(2, 3), bf16(3)), ValueError, r"input must be \[\*, K\] and weight \[N, K\]"),
    ("linear", (bf16(2, 3), bf16(4, 3), bf16(3)), ValueError, r"bias must be \[N\] = \(4,\), got \(3,\)"),
    ("mm", (bf16(2, 3), bf16(3, 4, dtype="float32")), TypeError, "share one dtype of bfloat16, float16, float32, got bfloat16"),
    ("mm", (bf16(2, 3, dtype="int8"), bf16(3, 4, dtype="int8")), TypeError, "a must be one of bfloat16, .* got int8"),
    ("addmm", (bf16(4, dtype="float16"), bf16(2, 3), bf16(3, 4)), TypeError, "bias must be bfloat16 or float32, got float16"),
]


@pytest.mark.parametrize(("op", "args", "error", "message"), ERRORS)
def test_errors_at_trace_time_name_the_op_the_argument_and_what_is_allowed(op, args, error, message):
    with pytest.raises(error, match=rf"bi_jax\.{op}: .*{message}"):
        jax.jit(getattr(bi_jax, op)).trace(*args)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (([[1.0]], draw(1, 1)), {}, "a must be an array, got list"),
        ((draw(1, 1), 1.0), {}, "b must be an array, got float"),
        ((np.ones((1, 1)), np.ones((1, 1))), {}, "a must be one of bfloat16, float16, float32, got float64"),
        ((draw(1, 1), draw(1, 1)), {"out_dtype": "float16"}, "out_dtype must be bfloat16 or float32, got float16"),
        ((draw(1, 1), draw(1, 1)), {"out_dtype": "wide"}, "out_dtype must be bfloat16 or float32, got wide"),
    ],
)
def test_arguments_that_are_not_arrays_or_dtypes(args, options, message):
    with pytest.raises(TypeError, match=rf"bi_jax\.mm: {message}"):
        bi_jax.mm(*args, **options)


def test_scalars_must_be_known_when_tracing():
    a, b, bias = draw(6, 20), draw(20, 5), draw(5)
    with pytest.raises(TypeError, match=r"bi_jax\.addmm: alpha must be a number that is known when tracing"):
        jax.jit(lambda s: bi_jax.addmm(bias, a, b, alpha=s))(2.0)
    with pytest.raises(TypeError, match=r"bi_jax\.addmm: beta must be a number"):
        bi_jax.addmm(bias, a, b, beta="1")


def test_64_bit_mode_and_matmul_precision_do_not_matter():
    a, b = draw(6, 20, dtype="float32"), draw(20, 5, dtype="float32", seed=1)
    with jax.enable_x64(True), jax.default_matmul_precision("bfloat16"):
        assert_same(bi_jax.mm(a, b), model(a, b))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_row_does_not_depend_on_the_batch(dtype):
    x, weight, bias = (np.asarray(draw(*s, dtype=dtype, seed=i)) for i, s in enumerate([(33, 70), (24, 70), (24,)]))
    linear = jax.jit(bi_jax.linear)
    whole = bits(linear(x, weight, bias))
    for size in (1, 16) if dtype == "bfloat16" else (3,):
        for start in (0, 10, 33 - size):
            assert_same(linear(x[start : start + size], weight, bias), whole[start : start + size])
    order = np.random.default_rng(0).permutation(33)
    assert_same(linear(x[order], weight, bias), whole[order])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_zeros_at_the_end_are_neutral(dtype):
    """Along K for outputs; along the rows of the batch for weight gradients. The engine's bits are the model's for any K."""
    x, weight, g = (draw(*s, dtype=dtype, kind="wide", seed=i) for i, s in enumerate([(13, 37), (6, 37), (13, 6)]))

    @jax.jit
    def outputs_and_gradient(x, weight, g):
        out, pullback = jax.vjp(lambda w: bi_jax.linear(x, w), weight)
        return out, pullback(g)[0]

    def pad(y, rows, columns):
        return np.pad(np.asarray(y), ((0, rows), (0, columns)))

    with model_engines():
        out, grad = map(bits, outputs_and_gradient(x, weight, g))
        padded_out, padded_grad = outputs_and_gradient(pad(x, 27, 30), pad(weight, 0, 30), pad(g, 27, 0))
    assert_same(padded_out[:13], out)
    assert_same(padded_grad[:, :37], grad)


KERNEL = "mosaic_gpu"
"""What the text of a module lowered for CUDA calls."""


def lowered(platform, op="mm", shapes=((64, 512), (512, 256)), dtype="bfloat16", **options):
    function = functools.partial(getattr(bi_jax, op), **options)
    args = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("m", "k", "n", "dtype"),
    [(1, 4096, 1024, "bfloat16"), (64, 512, 256, "float16"), (5, 7, 3, "bfloat16"), (99, 512, 72, "float32")],
)
def test_the_engine_is_that_of_the_platform_lowered_for(m, k, n, dtype):
    """On a machine without a GPU too: what `jax.devices()` says does not enter."""
    shapes = ((m, k), (k, n))
    assert KERNEL in lowered("cuda", shapes=shapes, dtype=dtype)
    assert KERNEL not in lowered("cpu", shapes=shapes, dtype=dtype)


@ops
def test_gradients_lower_to_kernels(op):
    def loss(*args):
        return getattr(bi_jax, op)(*args, out_dtype="float32").sum()

    args = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in CALLS[op]]
    grad = jax.jit(jax.grad(loss, argnums=tuple(range(len(args)))))
    text = grad.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert KERNEL in text
    assert "dot_general" not in text, "a product outside the contract"


def test_other_platforms_raise():
    with pytest.raises(NotImplementedError, match=r"bi_jax: no GEMM for .*'tpu'.*: supported are cpu and cuda \(sm_90\)"):
        lowered("tpu")


def test_other_gpus_raise(monkeypatch):
    class Device:
        compute_capability = "8.0"
        device_kind = "NVIDIA A100"

    monkeypatch.setattr(jax, "local_devices", lambda backend: [Device()])
    with pytest.raises(NotImplementedError, match="NVIDIA A100 is sm_80; there are kernels for sm_90 only"):
        lowered("cuda", shapes=((3, 24), (24, 40)))


def test_export():
    """An exported program has the same bits on a CPU; one for CUDA can be made without a GPU."""
    x, weight, bias = draw(6, 40), draw(8, 40, seed=1), draw(8, seed=2)
    args = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in (x, weight, bias)]
    for platforms in (["cpu"], ["cuda"], ["cpu", "cuda"]):
        blob = export.export(jax.jit(bi_jax.linear), platforms=platforms)(*args).serialize()
        loaded = export.deserialize(blob)
        assert list(loaded.platforms) == platforms
        assert (KERNEL in loaded.mlir_module()) == ("cuda" in platforms)
        if "cpu" in platforms:
            assert_same(loaded.call(x, weight, bias), model(x, weight.T, bias))


def test_export_of_a_gradient():
    x, weight = draw(6, 40), draw(8, 40, seed=1)
    grad = jax.jit(jax.grad(lambda w, x: bi_jax.linear(x, w, out_dtype="float32").sum()))
    blob = export.export(grad)(weight, x).serialize()
    assert_same(export.deserialize(blob).call(weight, x), grad(weight, x))


@pytest.mark.parametrize(
    ("a", "b", "options", "expected"),
    [
        ((1, 64, 512), (1, 512, 256), {}, 0),
        ((1, 1, 512), (1, 8, 512), {"transpose_rhs": True}, 0),
        ((3, 5, 8), (1, 8, 64), {}, 0),
        ((1, 64, 512), (1, 512, 256), {"out_dtype": "float32"}, 0),
        ((1, 64, 100), (1, 256, 100), {"transpose_rhs": True}, (64 + 256) * 104 * 2),
        ((2, 64, 64), (2, 64, 36), {}, 2 * 64 * 64 * 2 + 2 * 64 * 40 * 2),
        ((1, 4, 64), (1, 6, 64), {"transpose_rhs": True, "out_dtype": "float32"}, 4 * 8 * 4),
        ((1, 60, 64), (1, 64, 64), {"transpose_lhs": True, "transpose_rhs": True}, 64 * 64 * 2),
    ],
)
def test_workspace_of_16_bit_operands(a, b, options, expected):
    for dtype in ("bfloat16", "float16"):
        assert bi_jax.workspace_bytes(a, b, dtype, **options) == expected


def test_workspace_of_float32_is_the_parts():
    assert bi_jax.workspace_bytes((1, 64, 512), (1, 512, 256), "float32") == 6 * (64 * 512 + 512 * 256)
    assert bi_jax.workspace_bytes((1, 64, 512), (1, 256, 512), "float32", transpose_rhs=True) == 6 * 64 * 512


@pytest.mark.parametrize(
    ("a", "b", "transpose_lhs", "expected"),
    [
        ((1, 8, 516), (2, 4096, 516), False, 0),
        ((1, 8, 513), (2, 4096, 513), False, (8 + 2 * 4096) * 516 * 4),
        ((1, 516, 8), (2, 4096, 516), True, 8 * 516 * 4),
        ((1, 513, 8), (2, 4096, 513), True, (8 + 2 * 4096) * 516 * 4),
        ((1, 8, 516), (2, 6144, 516), False, 6 * 8 * 520),
    ],
)
def test_workspace_of_few_rows_of_float32(a, b, transpose_lhs, expected):
    """There the kernel cuts A, too, where N is no more than 4096."""
    assert bi_jax.workspace_bytes(a, b, "float32", transpose_lhs=transpose_lhs, transpose_rhs=True) == expected


def test_aligned_programs_copy_no_operand():
    """What `workspace_bytes` promises, in the lowered program: the kernel alone, no padding."""
    for m, dtype in ((64, "bfloat16"), (8, "float32")):
        text = lowered("cuda", op="linear", shapes=((m, 512), (256, 512)), dtype=dtype)
        assert text.count(KERNEL) >= 1
        assert not any(
            op in text for op in ("stablehlo.pad", "stablehlo.concatenate", "stablehlo.transpose", "stablehlo.slice")
        )
    assert "stablehlo.pad" in lowered("cuda", op="linear", shapes=((64, 500), (256, 500)))


def test_leading_dimensions_fold_into_one_product():
    text = lowered("cuda", op="linear", shapes=((2, 3, 64), (8, 64)))
    assert f"1x{math.prod((2, 3))}x64xbf16" in text
