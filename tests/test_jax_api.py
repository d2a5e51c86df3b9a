"""The public functions of `bi_jax` on a CPU: values, bits, shapes, arguments, errors, transformations, lowering and export."""

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
from shared_specs.formats import FORMATS, float_format
from shared_specs.inputs import operand_bits
from shared_specs.reference import gemm as reference
from tests.calls import CALLS

dtypes = pytest.mark.parametrize("dtype", FORMATS)


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
    jitted = jax.jit(getattr(bi_jax, op))(*args)
    assert_same(jitted, out)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((7,), (7,)),
        ((7,), (7, 5)),
        ((4, 7), (7,)),
        ((7,), (3, 7, 5)),
        ((3, 4, 7), (7, 5)),
        ((1, 4, 7), (3, 7, 5)),
        ((2, 1, 4, 7), (3, 7, 5)),
        ((2, 3, 4, 7), (2, 3, 7, 5)),
        ((0, 4, 7), (7, 5)),
        ((2, 0, 4, 7), (1, 7, 5)),
        ((0,), (0,)),
        ((3, 4, 0), (0, 5)),
    ],
)
def test_matmul_broadcasts_as_jnp_does(left, right):
    a, b = draw(*left), draw(*right, seed=1)
    shape = np.matmul(np.zeros(left), np.zeros(right)).shape
    wide_a, wide_b = (a[None] if a.ndim == 1 else a), (b[:, None] if b.ndim == 1 else b)
    assert_same(bi_jax.matmul(a, b), model(wide_a, wide_b).reshape(shape))


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 0, 7)])
def test_linear_takes_any_number_of_dimensions(shape):
    x, weight, bias = draw(*shape), draw(5, 7, seed=1), draw(5, seed=2)
    expected = model(x[None] if x.ndim == 1 else x, weight.T, bias).reshape(*shape[:-1], 5)
    assert_same(bi_jax.linear(x, weight, bias), expected)


@pytest.mark.parametrize(("m", "k", "n"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty_extents(m, k, n):
    a, b, bias = draw(m, k), draw(k, n, seed=1), draw(m, n, seed=2)
    assert_same(bi_jax.mm(a, b), model(a, b))
    assert_same(bi_jax.addmm(bias, a, b, beta=0.5), model(a, b, bias, beta=0.5))
    assert bi_jax.bmm(jnp.zeros((0, m, k), a.dtype), jnp.zeros((0, k, n), a.dtype)).shape == (0, m, n)
    grads = jax.grad(lambda *args: bi_jax.addmm(*args, out_dtype="float32").sum(), argnums=(0, 1, 2))(bias, a, b)
    assert [g.shape for g in grads] == [(m, n), (m, k), (k, n)]


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


@pytest.mark.parametrize(("op", "dtype"), [*((op, "bfloat16") for op in CALLS), ("linear", "float32")])
def test_gradients(op, dtype):
    """Against JAX's own products in float64; the bound is a few roundings of the products and of the operand dtype."""
    args = arguments(op, dtype)
    out, pullback = jax.vjp(getattr(bi_jax, op), *args)
    g = draw(*out.shape, dtype=dtype, seed=9)
    actual = jax.jit(pullback)(g)
    with jax.enable_x64(True):
        stock = {"linear": lambda x, w, c: x @ w.T + c}.get(op, STOCK[op] if len(args) == 3 else jnp.matmul)
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (*args, g)]
        expected, terms = (jax.vjp(stock, *x[:-1])[1](x[-1]) for x in (wide, [abs(x) for x in wide]))
        expected, terms = [np.asarray(x) for x in expected], [np.asarray(x) for x in terms]
    chain = 2.0**-21 if dtype == "float32" else 2.0**-18
    for x, got, want, size in zip(args, actual, expected, terms, strict=True):
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        bound = float(jnp.finfo(dtype).eps) * abs(want) + chain * size
        assert (abs(np.asarray(got, np.float64) - want) <= bound).all()


def test_value_and_gradient_of_a_loss():
    a, b = draw(6, 40), draw(40, 5, seed=1)
    value, grad = jax.jit(jax.value_and_grad(lambda a: bi_jax.mm(a, b, out_dtype="float32").sum()))(a)
    np.testing.assert_allclose(value, (np.asarray(a, np.float32) @ np.asarray(b, np.float32)).sum(), rtol=1e-4)
    assert_same(grad, model(jnp.ones((6, 5), a.dtype), b.T))


def test_gradients_are_products_under_the_contract():
    a, b, bias, g = draw(6, 20), draw(20, 5, seed=1), draw(5, seed=2), draw(6, 5, seed=3)
    _, pullback = jax.vjp(functools.partial(bi_jax.addmm, alpha=0.3, beta=1.7), bias, a, b)
    grad_bias, grad_a, grad_b = pullback(g)
    assert_same(grad_a, model(g, b.T, alpha=0.3))
    assert_same(grad_b, model(a.T, g, alpha=0.3))
    assert_same(grad_bias, model(jnp.ones((1, 6), g.dtype), g, alpha=1.7)[0])


def test_gradient_of_float32_outputs_is_rounded_to_the_operands_dtype():
    a, b, g = draw(6, 20), draw(20, 5, seed=1), draw(6, 5, dtype="float32", seed=3)
    _, pullback = jax.vjp(lambda a: bi_jax.mm(a, b, out_dtype="float32"), a)
    assert_same(pullback(g)[0], model(g.astype(a.dtype), b.T))


def test_second_order_gradients():
    """Reverse over reverse."""
    a, b = draw(4, 7, dtype="float32"), draw(3, 7, 5, dtype="float32", seed=1)

    def second(matmul, a, b):
        def first(a, b):
            grads = jax.grad(lambda a, b: jnp.square(matmul(a, b)).sum(), argnums=(0, 1))(a, b)
            return sum((g**3).sum() for g in grads)

        return jax.grad(first, argnums=(0, 1))(a, b)

    actual = jax.jit(functools.partial(second, bi_jax.matmul))(a, b)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(x, np.float64)) for x in (a, b))
        expected = [np.asarray(x) for x in second(jnp.matmul, *wide)]
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * abs(want).max())


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (1, 2), (-1, None)])
def test_vmap(axes):
    shapes = [(4, 7), (7, 5)]
    a, b = (
        draw(*s, seed=i) if axis is None else jnp.moveaxis(draw(3, *s, seed=i), 0, axis)
        for i, (s, axis) in enumerate(zip(shapes, axes, strict=True))
    )
    stacked = (x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip((a, b), axes, strict=True))
    assert_same(jax.jit(jax.vmap(bi_jax.mm, axes))(a, b), model(*stacked))


def test_vmap_over_biases_batches_and_twice():
    a, b, bias = draw(3, 4, 7), draw(3, 7, 5, seed=1), draw(3, 5, seed=2)
    assert_same(jax.vmap(bi_jax.addmm)(bias, a, b), model(a, b, bias[:, None]))
    assert_same(jax.vmap(bi_jax.addmm, (0, None, None))(bias, a[0], b[0]), model(a[0], b[0], bias[:, None]))
    assert_same(jax.vmap(bi_jax.addmm, (None, 0, None))(bias[0], a, b[0]), model(a, b[0], bias[0]))
    twice = jax.vmap(jax.vmap(bi_jax.mm, (None, 0)), (0, None))(a, b)
    assert_same(twice, model(a[:, None], b[None]))
    batched = jax.vmap(bi_jax.bmm, (None, 0))(a, jnp.stack([b, b[::-1]]))
    assert_same(batched, model(a, jnp.stack([b, b[::-1]])))
    assert jax.vmap(bi_jax.mm)(jnp.zeros((0, 2, 3)), jnp.zeros((0, 3, 4))).shape == (0, 2, 4)


def test_vmap_of_a_gradient_is_the_gradient_of_each():
    a, b = draw(3, 4, 7), draw(7, 5, seed=1)
    grad = jax.grad(lambda a, b: bi_jax.mm(a, b, out_dtype="float32").sum(), argnums=1)
    each = jnp.stack([grad(x, b) for x in a])
    assert_same(jax.jit(jax.vmap(grad, (0, None)))(a, b), each)


def test_control_flow_and_rematerialisation():
    a, b = draw(4, 7), draw(2, 7, 5, seed=1)
    expected = model(a, b)
    assert_same(jax.lax.scan(lambda carry, x: (carry, bi_jax.mm(a, x)), None, b)[1], expected)
    assert_same(jax.jit(lambda i: jax.lax.switch(i, [lambda: bi_jax.mm(a, b[0]), lambda: bi_jax.mm(a, b[1])]))(1), expected[1])
    loss = lambda a: bi_jax.mm(a, b[0], out_dtype="float32").sum()  # noqa: E731
    assert_same(jax.grad(jax.checkpoint(loss))(a), jax.grad(loss)(a))


def test_64_bit_mode_and_matmul_precision_do_not_matter():
    a, b = draw(6, 20, dtype="float32"), draw(20, 5, dtype="float32", seed=1)
    with jax.enable_x64(True), jax.default_matmul_precision("bfloat16"):
        assert_same(bi_jax.mm(a, b), model(a, b))


@dtypes
def test_a_row_does_not_depend_on_the_batch(dtype):
    x, weight, bias = (np.asarray(draw(*s, dtype=dtype, seed=i)) for i, s in enumerate([(33, 70), (24, 70), (24,)]))
    linear = jax.jit(bi_jax.linear)
    whole = bits(linear(x, weight, bias))
    for size in (1, 16) if dtype == "bfloat16" else (3,):
        for start in (0, 10, 33 - size):
            assert_same(linear(x[start : start + size], weight, bias), whole[start : start + size])
    order = np.random.default_rng(0).permutation(33)
    assert_same(linear(x[order], weight, bias), whole[order])


@dtypes
def test_zeros_at_the_end_are_neutral(dtype):
    """Along K for outputs; along the rows of the batch for weight gradients."""
    x, weight, g = (draw(*s, dtype=dtype, kind="wide", seed=i) for i, s in enumerate([(13, 37), (6, 37), (13, 6)]))

    @jax.jit
    def outputs_and_gradient(x, weight, g):
        out, pullback = jax.vjp(lambda w: bi_jax.linear(x, w), weight)
        return out, pullback(g)[0]

    def pad(y, rows, columns):
        return np.pad(np.asarray(y), ((0, rows), (0, columns)))

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


def test_aligned_programs_copy_no_operand():
    """What `workspace_bytes` promises, in the lowered program: the kernel alone, no padding."""
    text = lowered("cuda", op="linear", shapes=((64, 512), (256, 512)))
    assert text.count(KERNEL) >= 1
    assert not any(op in text for op in ("stablehlo.pad", "stablehlo.concatenate", "stablehlo.transpose", "stablehlo.slice"))
    assert "stablehlo.pad" in lowered("cuda", op="linear", shapes=((64, 500), (256, 500)))


def test_leading_dimensions_fold_into_one_product():
    text = lowered("cuda", op="linear", shapes=((2, 3, 64), (8, 64)))
    assert f"1x{math.prod((2, 3))}x64xbf16" in text
